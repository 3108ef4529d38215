"""Where a launch stands, and how it ends by itself."""

import enum


class End(Exception):
    """The launcher ends by itself: its exit code, and why."""

    def __init__(self, code: int, why: str):
        super().__init__(why)
        self.code = code


class Phase(enum.Enum):
    """What there is in the cloud, and so what is to be done when the launcher ends."""

    NOTHING = "nothing was asked for"
    ASKED = "a request of ours waits"
    FOUND = "a request of an earlier call waits"
    IDLE = "there is a slice on which nothing trains"
    TRAINING = "there is a slice that trains"
    OVER = "there is a slice whose run has ended"
