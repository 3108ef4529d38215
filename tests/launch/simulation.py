"""A cloud, the workers of a run and the launcher's machine, in simulated time.

Takes the place of `launch.tpu_pod.system.System`: what the launcher asks of gcloud is checked as
strictly as by the stand-in beside this, and answered by a world in which things go wrong at times
that follow from a seed. The guard on the workers acts as launch/pod/guard.sh does.
"""

import bisect
import dataclasses
import itertools
import json
import random
import re

from launch.tpu_pod.system import Done, System
from tests.launch import gcloud

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
HORIZON = 60 * DAY
TICK = 30.0  # seconds: the world's time goes on in steps of this


BROKEN = ("UNKNOWN", "REPAIRING", "RESTARTING", "STOPPED", "NEW_STATE")


class Killed(BaseException):
    """The launcher's process is gone: nothing that it would still do happens."""


@dataclasses.dataclass
class Worker:
    reachable: bool = True
    revision: str = ""
    trainer: str = "idle"  # idle, running, lost, ended
    code: int = 0
    stopped: bool = False


@dataclasses.dataclass
class Slice:
    """A node of the request."""

    state: str
    workers: list[Worker]
    recovers: float = 0.0  # when a state that passes ends


@dataclasses.dataclass
class Requested:
    """The queued resource."""

    state: str
    type: str
    count: int
    valid_until: float
    next_at: float  # when it changes by itself
    nodes: dict[str, Slice]
    failure: dict | None = None
    by_user: bool = False
    ready_at: float = 0.0
    last_use: float = 0.0
    last_progress: float = 0.0
    keep: float = 0.0
    max_run: float = 0.0


class Windows:
    """Times in which something is out of order: on average every `every` s, for `length` s."""

    def __init__(self, rng, every, length):
        self.edges, at = [], 0.0
        while every and at < HORIZON:
            at += rng.expovariate(1 / every)
            self.edges.append(at)
            at += rng.expovariate(1 / length)
            self.edges.append(at)

    def __contains__(self, at):
        return bisect.bisect_right(self.edges, at) % 2 == 1


@dataclasses.dataclass
class Troubles:
    """How often things go wrong, in seconds between them on average; 0: never."""

    preempted: float = 0.0
    broken: float = 0.0  # a node is repaired, restarts, or ends in UNKNOWN
    reboot: float = 0.0
    stockout: float = 0.0
    api: float = 0.0
    credentials: float = 0.0
    index: float = 0.0
    ssh: float = 0.0
    killed: float = 0.0  # the launcher
    interrupted: float = 0.0  # Ctrl-C, and launched again
    deaf: float = 0.0  # a worker stops for good, and its node is still READY
    by_hand: float = 0.0  # somebody deletes a node
    bug: float = 0.0  # probability that the run ends with a code that no restart can fix


class World(System):
    def __init__(self, seed, troubles, options, work):
        rng = self.rng = random.Random(seed)
        self.options, self.work = options, work
        self.t, self.killed_at, self.interrupt_at = 0.0, float("inf"), float("inf")
        self.request = None
        self.progress = self.saved = 0.0
        self.complete, self.finished = False, 0.0
        self.bug_at = work * rng.random() if rng.random() < troubles.bug else None
        self.said, self.events = [], []
        self.billed = self.idle = 0.0  # node seconds
        self.violations, self.creations, self.user_deleted = [], 0, False

        def times(every):
            steps = itertools.accumulate(
                rng.expovariate(1 / every) for _ in range(int(HORIZON / every) if every else 0)
            )
            return iter([*steps, float("inf")])

        self.hazards = {
            name: times(getattr(troubles, name))
            for name in ("preempted", "broken", "reboot", "deaf", "by_hand")
        }
        self.due = {name: next(one) for name, one in self.hazards.items()}
        self.kills, self.interrupts = times(troubles.killed), times(troubles.interrupted)
        self.no_stock = Windows(rng, troubles.stockout, 3 * HOUR)
        self.no_api = Windows(rng, troubles.api, 10 * MINUTE)
        self.no_credentials = Windows(rng, troubles.credentials, 5 * HOUR)
        self.no_index = Windows(rng, troubles.index, 15 * MINUTE)
        self.no_ssh = Windows(rng, troubles.ssh, 10 * MINUTE)

    # ------------------------------------------------------------------- the launcher's machine

    def now(self):
        return self.t

    def sleep(self, seconds):
        self.advance(seconds, launcher=True)

    def say(self, line):
        self.said.append((self.t, line))

    def show(self, line):
        pass

    def map(self, function, items):
        return [function(item) for item in items]

    def in_background(self, function):
        return lambda: bool(self.workers()) and self.workers()[0].trainer == "running"

    def end(self):
        pass

    def run(self, argv, timeout):
        assert argv[0] == "gcloud"
        self.advance(2, launcher=True)
        command, positionals, flags = gcloud.parse(argv[1:])
        if self.t in self.no_credentials:
            return Done(1, "", "There was a problem refreshing your current auth tokens")
        if self.t in self.no_api:
            return Done(1, "", "ERROR: (gcloud) UNAVAILABLE: try again")
        name = re.sub("[ -]", "_", command.removeprefix("alpha ").removeprefix("compute tpus "))
        try:
            return Done(0, getattr(self, name)(*positionals, **flags), "")
        except Refused as refused:
            return Done(1, "", f"ERROR: (gcloud) {refused}")

    # -------------------------------------------------------------------------- time passes

    def workers(self):
        nodes = self.request.nodes.values() if self.request else []
        return [worker for node in nodes for worker in node.workers]

    def active(self):
        return self.request is not None and self.request.state == "ACTIVE"

    def trains(self):
        """Whether the run goes on as it should."""
        return (
            self.active()
            and all(node.state == "READY" for node in self.request.nodes.values())
            and all(worker.trainer == "running" for worker in self.workers())
        )

    def advance(self, seconds, launcher=False):
        end = self.t + seconds
        while self.t < end:
            step = min(TICK, end - self.t)
            self.t += step
            self._pass(step)
            if launcher and self.t >= self.killed_at:
                raise Killed
            if launcher and self.t >= self.interrupt_at:
                self.interrupt_at = float("inf")
                raise KeyboardInterrupt

    def _pass(self, step):
        for name, at in self.due.items():
            if self.t >= at:
                self.due[name] = next(self.hazards[name])
                if self.active():
                    getattr(self, f"_{name}")()
        request = self.request
        if request is None:
            return
        if self.t >= request.next_at:
            self._next()
        if not self.active():
            return
        for node in request.nodes.values():
            if node.state not in ("PREEMPTED", "TERMINATED"):
                self.billed += step
                self.idle += step * (not self.trains())
            if 0 < node.recovers <= self.t:
                node.state, node.recovers = "READY", 0.0
        if self.trains():
            request.last_use = self.t
            self.progress += step
            request.last_progress = self.t
            if self.progress - self.saved >= 10 * MINUTE:
                self.saved = self.progress
            if self.bug_at is not None and self.progress >= self.bug_at:
                self._all_end(3)
            elif self.progress >= self.work:
                self.complete, self.finished = True, self.finished or self.t
                self._all_end(0)
        elif self.t - request.last_progress >= 3 * HOUR:
            self._all_end(76)  # supervisors of those that wait for a peer give up
        self._guard()

    def _all_end(self, code):
        for worker in self.workers():
            if worker.trainer == "running":
                worker.trainer, worker.code = "ended", code
        self.progress = self.saved = self.progress if code in (0, 75) else self.saved

    def _next(self):
        """The request changes by itself."""
        request = self.request
        request.next_at = float("inf")
        if request.state in ("ACCEPTED", "WAITING_FOR_RESOURCES"):
            if self.t >= request.valid_until:
                request.state = "FAILED"
                request.failure = {"code": 4, "message": "valid until has passed"}
            elif self.t in self.no_stock:
                request.state = "WAITING_FOR_RESOURCES"
                request.next_at = self.t + 5 * MINUTE
                if self.rng.random() < 0.02:
                    request.state = "FAILED"
                    request.failure = {"code": 8, "message": "no more capacity"}
            else:
                request.state, request.next_at = "PROVISIONING", self.t + 3 * MINUTE
        elif request.state == "PROVISIONING":
            request.state = "ACTIVE"
            request.ready_at = request.last_use = request.last_progress = self.t
            for node in request.nodes.values():
                node.state, node.recovers = "CREATING", self.t + self.rng.uniform(0, 5 * MINUTE)
        elif request.state == "SUSPENDING":
            request.state = "SUSPENDED"
        elif request.state == "DELETING":
            self.request = None

    def _guard(self):
        """What launch/pod/guard.sh does, on nodes that are up."""
        request = self.request
        if not any(node.state == "READY" for node in request.nodes.values()):
            return
        if any(worker.trainer == "running" for worker in self.workers()):
            request.last_use = self.t
        if request.max_run and self.t - request.ready_at >= request.max_run:
            for worker in self.workers():
                worker.stopped = True
            self._all_end(75)
            if self.t - request.ready_at >= request.max_run + 5 * MINUTE:
                self.delete("guard")
        elif request.keep and self.t - request.last_use >= request.keep:
            self.delete("guard")

    def delete(self, who):
        if self.trains():
            self.violations.append(f"{who} deleted a slice that trains at {self.t:.0f} s")
        self.events.append((self.t, f"deleted by {who}"))
        self.request.state, self.request.next_at = "DELETING", self.t + 1 * MINUTE

    # --------------------------------------------------------------------------- what happens

    def _preempted(self):
        self.events.append((self.t, "preempted"))
        for worker in self.workers():
            worker.trainer = "lost" if worker.trainer == "running" else worker.trainer
        self.progress = self.saved
        if self.rng.random() < 0.5:
            self.request.state, self.request.next_at = "SUSPENDING", self.t + 2 * MINUTE
        else:
            next(iter(self.request.nodes.values())).state = "PREEMPTED"

    def _broken(self):
        node = self.rng.choice(list(self.request.nodes.values()))
        state = self.rng.choice(BROKEN)
        self.events.append((self.t, state))
        node.state = state
        if state in ("REPAIRING", "RESTARTING") or self.rng.random() < 0.3:
            node.recovers = self.t + self.rng.expovariate(1 / (15 * MINUTE))
        for worker in node.workers:
            worker.trainer = "lost" if worker.trainer == "running" else worker.trainer
        self.progress = self.saved

    def _reboot(self):
        worker = self.rng.choice(self.workers())
        if worker.trainer == "running":
            self.events.append((self.t, "a worker was rebooted"))
            worker.trainer = "lost"
            self.progress = self.saved

    def _deaf(self):
        worker = self.rng.choice(self.workers())
        self.events.append((self.t, "a worker is out for good"))
        worker.reachable = False
        worker.trainer = "lost" if worker.trainer == "running" else worker.trainer
        self.progress = self.saved

    def _by_hand(self):
        self.events.append((self.t, "somebody deleted the node"))
        self.request.state, self.request.by_user = "SUSPENDED", True
        self.user_deleted = True

    # ------------------------------------------------------------------------ gcloud's commands

    def queued_resources_create(self, name, *, accelerator_type, metadata, **flags):
        if self.request is not None:
            raise Refused("ALREADY_EXISTS: it exists")
        if self.t in self.no_stock and self.rng.random() < 0.5:
            raise Refused("RESOURCE_EXHAUSTED: no more capacity in the zone")
        tell = dict(pair.split("=", 1) for pair in metadata.split(","))
        names = [f"{name}-{i}" for i in range(int(flags.get("node_count", 0)))] or [name]
        self.request = Requested(
            state="ACCEPTED",
            type=accelerator_type,
            count=len(names),
            valid_until=self.t + float(flags["valid_until_duration"][:-1]),
            next_at=self.t + self.rng.expovariate(1 / (20 * MINUTE)),
            nodes={one: Slice("CREATING", [Worker(), Worker()]) for one in names},
            keep=float(tell["spectral-pod-keep-seconds"]),
            max_run=float(tell["spectral-pod-max-run-seconds"]),
        )
        self.creations += 1
        if self.rng.random() < 0.05:
            raise Refused("the answer was lost")
        return ""

    def queued_resources_describe(self, name, **flags):
        request = self._there()
        state = {"state": request.state, "stateInitiator": "USER" if request.by_user else "SERVICE"}
        if request.failure:
            state["failedData"] = {"error": request.failure}
        spec = {"node": {"acceleratorType": request.type}}
        if request.count > 1:
            spec["multisliceParams"] = {"nodeCount": request.count}
        return json.dumps({"state": state, "tpu": {"nodeSpec": [spec]}})

    def queued_resources_list(self, **flags):
        return ""

    def queued_resources_delete(self, name, **flags):
        request = self._there()
        if request.state != "DELETING":
            self.delete("launcher")
        while self.request is request:
            self.advance(TICK, launcher=True)
        return ""

    def tpu_vm_list(self, **flags):
        nodes = self.request.nodes if self.active() else {}
        return json.dumps(
            [
                {
                    "name": f"p/{name}",
                    "state": node.state,
                    "networkEndpoints": [{}] * len(node.workers),
                }
                for name, node in nodes.items()
            ]
        )

    def tpu_vm_scp(self, source, target, **flags):
        self._connect(target.rpartition("@")[2].partition(":")[0])
        return ""

    def tpu_vm_ssh(self, node, *, command, worker, **flags):
        node = node.rpartition("@")[2]
        there = self._connect(node)
        chosen = range(len(there.workers)) if worker == "all" else map(int, worker.split(","))
        script = re.search(r"(\w+)\.sh", command.rpartition("launch/pod/")[2])[1]
        if script == "install":
            self.advance(self.rng.uniform(60, 240), launcher=True)
        lines = []
        for index in chosen:
            one, host = there.workers[index], f"t1v-{node}-w-{index}"
            if not one.reachable or (self.t in self.no_ssh and self.rng.random() < 0.5):
                continue
            if there.state != "READY":
                break
            # common.sh touches a file, at which the guard looks
            if self.request:
                self.request.last_use = self.t
            text, code = getattr(self, f"_{script}")(one, command)
            lines.append(f"{host}{text}\nspectral_pod: {host} {code}.")
        if not lines:
            raise Refused("Connection timed out")
        return "\n".join(lines)

    def tpu_vm_accelerator_types_describe(self, name, **flags):
        return name

    def tpu_vm_versions_describe(self, name, **flags):
        return name

    def auth_list(self, **flags):
        return "me@example.com"

    def config_get_value(self, name, **flags):
        return "project-1"

    def storage_buckets_describe(self, url, **flags):
        return "US-CENTRAL2"

    def storage_ls(self, url, **flags):
        if not self.complete:
            raise Refused("One or more URLs matched no objects.")
        return url

    def _there(self):
        if self.request is None:
            raise Refused("NOT_FOUND: no such resource")
        return self.request

    def _connect(self, node):
        if not self.active() or node not in self.request.nodes:
            raise Refused("NOT_FOUND: no such node")
        if self.request.nodes[node].state != "READY":
            raise Refused("This TPU has a terminal state")
        return self.request.nodes[node]

    # ------------------------------------------------------------------------- on the workers

    def _install(self, worker, command):
        if worker.revision == "1":
            return ": installed", 0
        if self.t in self.no_index:
            return ": no network", 1
        worker.revision = "1"
        return ": installed", 0

    def _start(self, worker, command):
        if worker.trainer == "running":
            return ": runs already", 0
        worker.trainer, worker.stopped = "running", False
        return ": started", 0

    def _status(self, worker, command):
        detail = {"running": "1", "ended": str(worker.code)}.get(worker.trainer, "-")
        state = worker.trainer
        if state == "ended" and worker.code == 75 and not worker.stopped:
            state, detail = "lost", "-"
        step = f" step {self.progress:.0f}" if worker is self.workers()[0] else ""
        return f" {state} {detail}{step}", 0

    def _stop(self, worker, command):
        worker.stopped = True
        if worker.trainer == "running":
            worker.trainer, worker.code = "ended", 75
        return " ended 75", 0

    def _guarded(self, worker, command):
        return ": yes", 0

    def _explain(self, worker, command):
        return "", 0


class Refused(Exception):
    pass
