"""A request for TPUs and its nodes, by gcloud: what is asked of it, and what its answers mean."""

import dataclasses
import enum
import json
import re
from collections.abc import Sequence
from typing import Any

from .options import Options
from .states import ABSENT
from .system import System


class Trouble(enum.Enum):
    """Why gcloud failed."""

    ABSENT = "there is no such thing"
    CREDENTIALS = "your credentials have expired"
    DENIED = "you may not"
    EXISTS = "it exists"
    EXHAUSTED = "no capacity or quota"
    INVALID = "not a request that can be met"
    UNAVAILABLE = "no answer, or a fault that may pass"


# The first that matches. gcloud prints the service's status; its own messages are of 528.0.0.
_MESSAGES = (
    (Trouble.CREDENTIALS, "UNAUTHENTICATED|gcloud auth login|[Rr]eauthenticat|invalid_grant"),
    (Trouble.CREDENTIALS, "refreshing your current auth tokens|active account selected"),
    (Trouble.ABSENT, "NOT_FOUND|HTTPError 404|not found: 404"),
    (Trouble.EXISTS, "ALREADY_EXISTS"),
    (Trouble.EXHAUSTED, "RESOURCE_EXHAUSTED|[Qq]uota|no more capacity|[Ss]tockout"),
    (Trouble.DENIED, "PERMISSION_DENIED|HTTPError 403|does not have permission"),
    (Trouble.INVALID, "INVALID_ARGUMENT|FAILED_PRECONDITION|unrecognized arguments|argument --"),
)


def trouble(text: str) -> Trouble:
    """The kind of fault that a message of gcloud's is about."""
    found = (kind for kind, pattern in _MESSAGES if re.search(pattern, text))
    return next(found, Trouble.UNAVAILABLE)


class CloudError(Exception):
    """What gcloud complains about, and the line that says most."""

    def __init__(self, text: str):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        super().__init__("\n".join(lines))
        self.kind = trouble(text)
        lines = [line for line in lines if line.startswith("ERROR:")] or lines
        self.line = lines[-1] if lines else "gcloud failed without a message"


@dataclasses.dataclass(frozen=True)
class Request:
    """A queued resource, as it is now."""

    state: str
    by_user: bool  # somebody brought it into this state, not the platform
    type: str
    num_slices: int
    failure: str  # why it FAILED
    failure_code: int  # as google.rpc.Code; 0: not known


@dataclasses.dataclass(frozen=True)
class Node:
    """One slice: its name, state and number of hosts."""

    name: str
    state: str
    num_workers: int


@dataclasses.dataclass(frozen=True)
class Worker:
    """One host of a slice."""

    node: str
    index: int

    def __str__(self) -> str:
        return f"worker {self.index} of {self.node}"


_QUICK, _SLOW = 180.0, 1800.0  # seconds that a call may take
# Whose home is used on the workers, from whichever machine; with OS Login it is the account's own.
_USER = "trainer"
# gcloud tries ten times to connect, and sets no limit of its own. A connection that has died ends.
_LIMITS = ("-oConnectTimeout=20", "-oServerAliveInterval=30")


class Cloud:
    """gcloud's commands for one request. All raise CloudError."""

    def __init__(self, options: Options, system: System):
        self._options, self._system = options, system
        project = [f"--project={options.project}"] if options.project else []
        self._place = [f"--zone={options.zone}", *project]
        self._project = project

    # ------------------------------------------------------------------------------ the request

    def request(self) -> Request | None:
        """The request as it is; None if there is none."""
        try:
            text = self._tpus("queued-resources", "describe", self._options.name, "--format=json")
        except CloudError as error:
            if error.kind is Trouble.ABSENT:
                return None
            raise
        found = _json(text)
        state, spec = found.get("state", {}), found["tpu"]["nodeSpec"][0]
        failure = state.get("failedData", {}).get("error", {})
        return Request(
            state=state.get("state", "STATE_UNSPECIFIED"),
            by_user=state.get("stateInitiator") == "USER",
            type=spec["node"].get("acceleratorType", ""),
            num_slices=int(spec.get("multisliceParams", {}).get("nodeCount", 1)),
            failure=failure.get("message", ""),
            failure_code=int(failure.get("code", 0)),
        )

    def nodes(self) -> list[Node]:
        """The nodes that the request has or should have, in order."""
        there = {}
        for one in _json(self._tpus("tpu-vm", "list", "--format=json")) or []:
            name = one["name"].rpartition("/")[2]
            there[name] = Node(name, one.get("state", ""), len(one.get("networkEndpoints", [])))
        return [there.get(name, Node(name, ABSENT, 0)) for name in self._options.nodes]

    def create(self, guard: Sequence[str]) -> None:
        """Asks for the TPUs. `guard` are the flags that put the guard onto every worker."""
        options = self._options
        which = [f"--node-id={options.name}"]
        if options.num_slices > 1:
            which = [f"--node-count={options.num_slices}", f"--node-prefix={options.name}"]
        self._tpus(
            "queued-resources",
            "create",
            options.name,
            *which,
            f"--accelerator-type={options.type}",
            f"--runtime-version={options.runtime_version}",
            f"--valid-until-duration={options.wait_minutes * 60}s",
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
            *options.create_flags,
            *guard,
            track=self._create_track(),
            timeout=_SLOW,
        )

    def delete(self) -> None:
        """Deletes the request and its nodes, and waits until they are gone."""
        try:
            self._tpus(
                "queued-resources", "delete", self._options.name, "--force", "--quiet",
                timeout=_SLOW,
            )  # fmt: skip
        except CloudError as error:
            if error.kind is not Trouble.ABSENT:
                raise

    # ------------------------------------------------------------------------------ the workers

    def copy(self, node: str, workers: str, file: str, target: str, limit: float) -> None:
        """Copies a file into the home of workers, all or their numbers, within `limit` seconds."""
        limits = [f"--scp-flag={flag}" for flag in _LIMITS]
        self._tpus(
            "tpu-vm", "scp", file, f"{_USER}@{node}:{target}", f"--worker={workers}",
            *self._route(), *limits, "--quiet", track=self._ssh_track(), timeout=limit,
        )  # fmt: skip

    def reach(self, node: str, workers: str, command: str, limit: float = _QUICK) -> str:
        """What a command prints on workers; lines of several workers are mixed."""
        done = self._system.run(self.reaching(node, workers, command), timeout=limit)
        if not done.out and done.code:
            raise CloudError(done.err)
        return done.out

    def reaching(self, node: str, workers: str, command: str) -> list[str]:
        """The command line that runs a command on workers."""
        limits = [f"--ssh-flag={flag}" for flag in _LIMITS]
        return self._argv(
            "tpu-vm", "ssh", f"{_USER}@{node}", f"--worker={workers}", *self._route(), *limits,
            "--quiet", f"--command={command}", track=self._ssh_track(),
        )  # fmt: skip

    def _route(self) -> list[str]:
        flags = {"iap": ["--tunnel-through-iap"], "internal": ["--internal-ip"]}
        return flags.get(self._options.ssh, [])

    def _ssh_track(self) -> list[str]:
        return ["alpha"] if self._options.ssh == "iap" else []

    def _create_track(self) -> list[str]:
        return ["alpha"] if self._options.reservation else []

    # --------------------------------------------------------------------------- before renting

    def account(self) -> str:
        """Who is logged in; empty if nobody is."""
        return self._gcloud("auth", "list", "--filter=status:ACTIVE", "--format=value(account)")

    def project(self) -> str:
        return self._options.project or self._gcloud("config", "get-value", "project")

    def offers(self, what: str, name: str) -> None:
        """Fails if the zone has no such accelerator type or runtime version."""
        self._tpus("tpu-vm", what, "describe", name, "--format=value(name)")

    def list_requests(self) -> None:
        """Fails if the TPU API is not there or not allowed, or gcloud lacks a component."""
        track = self._ssh_track() or self._create_track()
        self._tpus("queued-resources", "list", "--format=value(name)", track=track)

    def bucket_location(self, bucket: str) -> str:
        return self._gcloud(
            "storage", "buckets", "describe", bucket, "--format=value(location)", *self._project
        )

    def exists(self, url: str) -> bool:
        """Whether there is an object or folder at a gs:// address."""
        try:
            return bool(self._gcloud("storage", "ls", url, *self._project))
        except CloudError as error:
            if error.kind is Trouble.ABSENT or "matched no objects" in str(error):
                return False
            raise

    def service_account(self, email: str) -> None:
        """Fails if there is no such account."""
        self._gcloud("iam", "service-accounts", "describe", email, "--format=value(email)")

    def _argv(self, *arguments: str, track: Sequence[str] = ()) -> list[str]:
        return ["gcloud", *track, "compute", "tpus", *arguments, *self._place]

    def _tpus(self, *arguments: str, track: Sequence[str] = (), timeout: float = _QUICK) -> str:
        return self._run(self._argv(*arguments, track=track), timeout)

    def _gcloud(self, *arguments: str) -> str:
        return self._run(["gcloud", *arguments], _QUICK)

    def _run(self, argv: Sequence[str], timeout: float) -> str:
        done = self._system.run(argv, timeout)
        if done.code:
            raise CloudError(done.err)
        return done.out.strip()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CloudError(f"gcloud's answer is not JSON: {text[:200]!r}") from error
