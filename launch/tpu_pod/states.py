"""What the states of a request for TPUs and of its nodes mean, and what is done about each.

The names are those of the API: `QueuedResourceState.State` and `Node.State` in
cloud.google.com/tpu/docs/reference/rest/v2. A name that is not here waits for half an hour, as one
that a later version of the API adds may well pass.
"""

import dataclasses
import enum


class Then(enum.Enum):
    """What the launcher does."""

    WAIT = "waits"
    USE = "uses it"
    REPLACE = "deletes it and asks for another"
    ASK_AGAIN = "asks again if the message says that there was no capacity, else ends"
    GONE = "waits until it is gone; in the middle of a run it ends, as somebody deleted it"


@dataclasses.dataclass(frozen=True)
class State:
    then: Then
    meaning: str
    patience: float = float("inf")  # minutes to wait before it is replaced

    def after(self, minutes: float) -> Then:
        """What to do when it has been in this state for so long."""
        return Then.REPLACE if self.then is Then.WAIT and minutes >= self.patience else self.then


_LATER = State(Then.WAIT, "is in a state that this version does not know", 30)

# Waiting here is limited by --wait_minutes, which is also given to the platform.
REQUESTS = {
    "STATE_UNSPECIFIED": State(Then.WAIT, "is in no known state"),
    "CREATING": State(Then.WAIT, "is being received"),
    "ACCEPTED": State(Then.WAIT, "is in the queue"),
    "WAITING_FOR_RESOURCES": State(Then.WAIT, "is in the queue"),
    "PROVISIONING": State(Then.WAIT, "is being provisioned"),
    "ACTIVE": State(Then.USE, "has its TPUs"),
    "FAILED": State(Then.ASK_AGAIN, "was refused"),
    "SUSPENDING": State(Then.REPLACE, "is losing its TPUs"),
    "SUSPENDED": State(Then.REPLACE, "has lost its TPUs"),
    "DELETING": State(Then.GONE, "is being deleted"),
}
ABSENT = "ABSENT"  # a node of an active request that does not exist
# While a node is in one of these, all nodes of the request are billed.
NODES = {
    "READY": State(Then.USE, "is ready"),
    "STATE_UNSPECIFIED": State(Then.WAIT, "is in no known state", 10),
    "CREATING": State(Then.WAIT, "is being created", 60),
    "STARTING": State(Then.WAIT, "is starting", 30),
    "RESTARTING": State(Then.WAIT, "is restarting", 30),
    "REIMAGING": State(Then.WAIT, "is being imaged again", 30),
    "REPAIRING": State(Then.WAIT, "is being repaired", 60),
    "UNHIDING": State(Then.WAIT, "is coming back", 30),
    "UNKNOWN": State(Then.WAIT, "is in an unknown state after a failed repair", 10),
    ABSENT: State(Then.WAIT, "is not there", 5),
    "STOPPING": State(Then.REPLACE, "is stopping"),
    "STOPPED": State(Then.REPLACE, "is stopped"),
    "PREEMPTED": State(Then.REPLACE, "was preempted"),
    "TERMINATED": State(Then.REPLACE, "was terminated"),
    "DELETING": State(Then.REPLACE, "is being deleted"),
    "HIDING": State(Then.REPLACE, "is being withdrawn"),
    "HIDDEN": State(Then.REPLACE, "was withdrawn"),
}


def request(name: str) -> State:
    return REQUESTS.get(name, _LATER)


def node(name: str) -> State:
    return NODES.get(name, _LATER)
