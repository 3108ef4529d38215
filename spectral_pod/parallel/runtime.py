"""The processes of a run: joining them, meeting at named points, and leaving together.

Joining and the detection of dead processes are JAX's: its coordination service runs in process 0,
every process sends it heartbeats, and one whose heartbeats stop is dead to all others. What is
added here is what a process tells the others before it leaves, so that all end with the same code
and say whose fault it was; the codes are in `errors.py`.
"""

import atexit
import collections
import contextlib
import glob
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import cloud_tpu_init, distributed  # JAX has no public door to its key-value store
from jax.experimental import multihost_utils

from spectral_pod.errors import ConfigError, LostPeerError, Preempted

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd")  # TPUs and GPUs
_HEARTBEAT_SECONDS = 10  # of silence, after which a process is dead to the others
_JOIN_SECONDS = 300  # until all processes are there
_NEWS_SECONDS = 1.0  # that news take to reach all: so long process 0 serves them before it leaves
_CLOSE_SECONDS = 15.0  # for what was begun to be finished
_KEYS = "spectral_pod"
_PREEMPTION_KEY = "RECEIVED_PREEMPTION_NOTICE"  # of JAX's preemption service

# How the loss of a peer reads in what collectives, barriers and the coordination service raise,
# and in no error of storage.
_PEER_IS_GONE = (
    "Gloo", "NCCL", "CoordinationService", "coordination service", "tasks are unhealthy",
    "Barrier timed out", "another task died",
)  # fmt: skip


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    bind_address: str | None = None,
) -> None:
    """Joins the processes of a run; called before anything else is asked of JAX.

    Who they are is told by the arguments, or by the environment variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_COORDINATOR_BIND_ADDRESS; else JAX asks SLURM, or the
    metadata of Cloud TPU and GKE; where there is none of these it is a run of one process.

    Args:
      coordinator_address: host:port on which process 0 serves the others.
      bind_address: ip:port that it listens on, the coordinator's own unless given.

    Raises:
      ConfigError: the arguments contradict each other, or the platform cannot tell.
      LostPeerError: not all processes were there in time.
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = num_processes if num_processes is not None else _env_int("JAX_NUM_PROCESSES")
    index = process_id if process_id is not None else _env_int("JAX_PROCESS_ID")
    if not (os.environ.get("JAX_PLATFORMS") or any(map(glob.glob, _ACCELERATORS))):
        # libtpu, installed to compile for TPUs elsewhere, would look for one here, complain at
        # length, and bring down JAX's profiler.
        jax.config.update("jax_platforms", "cpu")
    if coordinator_address is None and num_processes == 1:
        return
    if address is None and not _is_managed():
        if (count or 1) > 1 or index:
            raise ConfigError(
                f"--num_processes={count} --process_id={index} without --coordinator_address: give "
                "the host:port of process 0"
            )
        return
    if address is not None and (count is None or index is None or not 0 <= index < count):
        raise ConfigError(
            f"--coordinator_address={address} with --num_processes={count} --process_id={index}: "
            "give both, 0 <= process_id < num_processes"
        )
    bind_address = bind_address or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            coordinator_bind_address=bind_address,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f"JAX cannot tell the processes of this run from the platform ({error}); give "
            "--coordinator_address, --num_processes and --process_id, or --num_processes=1"
        ) from error
    except RuntimeError as error:
        raise LostPeerError(
            f"process {index} could not join {count} processes at {address}: {error}"
        ) from error
    atexit.register(_part)
    _client().key_value_set(f"{_KEYS}/host/{this_process()}", socket.gethostname())
    _when_set(_PREEMPTION_KEY, lambda _: preemption.note())
    when_told("ended", _leave_with)


def check_platform() -> None:
    """Makes sure that what JAX found is what JAX_PLATFORMS puts first.

    Raises:
      ConfigError: it is not; JAX itself goes on with the next one without a word.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if wanted and {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted) != jax.default_backend():
        raise ConfigError(
            f"JAX_PLATFORMS asks for {wanted}, and JAX has found {jax.default_backend()} only; is "
            "the driver there, and the container started with access to the devices?"
        )


def _part() -> None:
    """Disconnects, and ends the threads that listen: one within JAX would abort Python's exit."""
    if _client() is not None:
        jax.distributed.shutdown()  # waits for the others; wakes the listeners
        for listener in _listeners:
            listener.join(_NEWS_SECONDS)


def this_process() -> int:
    """The number of this process in the run. Asks no device, which may be what hangs."""
    return distributed.global_state.process_id


def num_processes() -> int:
    """How many processes have joined."""
    return distributed.global_state.num_processes


def is_leader() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """One line to the user, from the leader only."""
    if is_leader():
        print(line, flush=True)


def barrier(name: str, timeout_s: float = 3600) -> None:
    """Waits for every process to arrive at `name`.

    Raises:
      LostPeerError: some did not within `timeout_s` seconds; names them.
    """
    if num_processes() == 1:
        return
    client, here = _client(), f"{_KEYS}/arrived/{name}"
    client.key_value_set(f"{here}/{this_process()}", "", allow_overwrite=True)
    try:
        client.wait_at_barrier(f"{_KEYS}/{name}", timeout_in_ms=int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        missing = _named(set(range(num_processes())) - _by_process(here).keys())
        raise LostPeerError(
            f"{missing} did not arrive at {name!r} within {timeout_s:.0f} s; see the log there"
        ) from None
    client.key_value_delete(f"{here}/{this_process()}")


def compare(name: str, facts: Mapping[str, str], timeout_s: float = 600) -> None:
    """Checks that every process has the same facts; hosts that differ would hang or train nonsense.

    Raises:
      ConfigError: on all processes; names who differs from the most of them, and in what.
      LostPeerError: some process did not tell its facts in time.
    """
    if num_processes() == 1:
        return
    client, here = _client(), f"{_KEYS}/facts/{name}"
    client.key_value_set(f"{here}/{this_process()}", json.dumps(dict(facts)))
    barrier(f"facts of {name}", timeout_s)
    if this_process() == 0:
        told = {process: json.loads(text) for process, text in _by_process(here).items()}
        client.key_value_set(f"{_KEYS}/verdict/{name}", json.dumps(differences(told, _named)))
    wait_ms = int(timeout_s * 1000)
    different = json.loads(client.blocking_key_value_get(f"{_KEYS}/verdict/{name}", wait_ms))
    if different:
        raise ConfigError(
            "the processes of a run must be the same; stop them all and start them alike:\n"
            + "\n".join(different)
        )


def differences(
    facts: Mapping[int, Mapping[str, str]], named: Callable[[Iterable[int]], str]
) -> list[str]:
    """A line for each fact that is not the same everywhere: who has another than most, and what."""
    lines = []
    for field in sorted({field for mine in facts.values() for field in mine}):
        holders = collections.defaultdict(list)
        for index in sorted(facts):
            holders[facts[index].get(field, "nothing")].append(index)
        # Of equally many the side of process 0 is the rule: it was met first.
        common = max(holders, key=lambda value: len(holders[value]))
        lines += [
            f"  {named(odd)}: {field} is {value}, not {common}"
            for value, odd in holders.items()
            if value != common
        ]
    return lines


def share(name: str, value: str) -> None:
    """Leaves `value` of this process where the leader's `shared` finds it; waits for nobody."""
    if num_processes() > 1:
        key = f"{_KEYS}/shared/{name}/{this_process()}"
        _client().key_value_set(key, value, allow_overwrite=True)


def shared(name: str) -> dict[int, str]:
    """What each process `share`d last under this name, of those that have."""
    return _by_process(f"{_KEYS}/shared/{name}")


def tell(news: str, value: str) -> None:
    """Tells all processes; of several that tell the same news the first is heard."""
    if _client() is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # told already, or nobody is left
            _client().key_value_set(f"{_KEYS}/{news}", value)


def when_told(news: str, act: Callable[[str], None]) -> None:
    """Calls `act`, on a thread, with what any process, this one too, `tell`s."""
    if _client() is not None:
        _when_set(f"{_KEYS}/{news}", act)


class Preemption:
    """SIGTERM to any process, as clouds and schedulers send it, ends the run with its state saved.

    The processes agree on the point where they stop: at the same call of `reached`. Whatever they
    are held up by meanwhile, `seconds` after the signal they leave; so they do at once as long as
    there is nothing that the newest checkpoint lacks. The signal is heard on a thread, as the main
    one may spend minutes in a compilation or waiting for data.
    """

    def __init__(self) -> None:
        self.seconds = 25.0  # of the 30 that a machine has left when it is reclaimed
        self.something_to_save = False
        self.heard = threading.Event()
        self._calls = 0

    def listen(self) -> None:
        """Hears signals from now on. Once processes are joined JAX's preemption service does."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to before any handler

        def hear() -> None:
            while signal.SIGTERM not in os.read(reader, 1):
                pass
            self.note()

        threading.Thread(target=hear, name="preemption", daemon=True).start()

    def note(self) -> None:
        """A signal came, here or to another process."""
        if not self.something_to_save:
            self._leave("there is nothing new to save")
        self.heard.set()
        late = f"no step ended within {self.seconds:g} s: what was saved before is kept"
        timer = threading.Timer(self.seconds, self._leave, (late,))
        timer.daemon = True
        timer.start()

    def reached(self) -> bool:
        """Whether to save and leave here. All processes ask equally often, at the same points."""
        self._calls += 1
        if _client() is None:
            return self.heard.is_set()
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def _leave(self, why: str) -> NoReturn:
        leave(Preempted.exit_code, f"Preempted: SIGTERM came; {why}")


class Interrupt:
    """Ctrl-C within this context waits for `check`; a second one doesn't.

    Raised wherever it happens to arrive, KeyboardInterrupt is lost when that is one of JAX's
    garbage-collection callbacks.
    """

    def __enter__(self) -> "Interrupt":
        self._noted = False
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was one."""
        if self._noted:
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        self.check()
        self._noted = True


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error is what the loss of another process looks like."""
    return num_processes() > 1 and any(sign in str(error) for sign in _PEER_IS_GONE)


@contextlib.contextmanager
def leaving_the_dead() -> Iterator[None]:
    """Leaves at once when another process is lost: what closes outside of this context, such as a
    save that all take part in, would wait for it. Other errors have the time to close."""
    try:
        yield
    except BaseException as error:
        new = not _closing.is_set()  # contexts of this kind lie in each other
        _closing.set()
        if is_peer_loss(error):
            end(LostPeerError.exit_code, f"LostPeerError: {error}")
        by_jax = any(isinstance(e, jax.errors.JaxRuntimeError) for e in (error, error.__cause__))
        if new and by_jax and num_processes() > 1:
            # Where no text tells: if a peer is dead, JAX ends this process by the next heartbeats.
            time.sleep(_HEARTBEAT_SECONDS + _NEWS_SECONDS)
        raise


def end(code: int, message: str) -> NoReturn:
    """Ends this process for a reason that all of them share: tells the others, then leaves.

    Not through JAX's exit handlers: those wait for processes that may be dead.
    """
    if _client() is None:
        print(message, file=sys.stderr, flush=True)
        sys.exit(code)
    if code == LostPeerError.exit_code:
        time.sleep(_NEWS_SECONDS)  # if the peer had something to say, `_leave_with` ends this
        if preemption.heard.is_set():
            code = Preempted.exit_code  # it left before, by the same signal
    elif code != Preempted.exit_code:  # which all agreed upon
        news = {"process": this_process(), "code": code, "message": message}
        tell("ended", json.dumps(news))
    leave(code, message)


def leave(code: int, message: str) -> NoReturn:
    """Ends this process now, whatever its threads are doing."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if _client() is not None and distributed.global_state.service is not None:
        time.sleep(_NEWS_SECONDS)  # the others hear the news from here
    os._exit(code)


def _leave_with(news: str) -> None:
    """Another process ended for a reason of all."""
    told = json.loads(news)
    if told["process"] != this_process():
        if _closing.is_set():  # this one ends, too, and may be sealing a checkpoint
            time.sleep(_CLOSE_SECONDS)
        leave(told["code"], f"{_named([told['process']])} ended the run: {told['message']}")


def _when_set(key: str, act: Callable[[str], None]) -> None:
    """Calls `act`, on a thread, with the value of `key` once it has one."""

    client = _client()

    def wait() -> None:
        while True:
            try:
                value = client.blocking_key_value_get(key, 3_600_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                return  # the coordinator is gone: JAX ends this process
            return act(value)

    _listeners.append(threading.Thread(target=wait, name=f"news of {key}", daemon=True))
    _listeners[-1].start()


def _is_managed() -> bool:
    """Whether a platform that JAX can ask started this process."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in os.environ for name in slurm):
        return int(os.environ["SLURM_NTASKS"]) > 1
    excluded = "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu")
    return bool(cloud_tpu_init.running_in_cloud_tpu_vm) and not excluded


def _env_int(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise ConfigError(f"the environment variable {name} is {value!r}; it must be a number")
    return None if value is None else int(value)


def _client() -> Any:
    """JAX's door to the coordination service; None in a run of one process that joined none."""
    return distributed.global_state.client


def _by_process(keys: str) -> dict[int, str]:
    """The values below `keys`, where each process has one."""
    return {int(k.rsplit("/", 1)[1]): value for k, value in _client().key_value_dir_get(keys)}


def _named(processes: Iterable[int]) -> str:
    """'process 1 (host a), process 2 (host b)'; of many the first few."""
    hosts = _by_process(f"{_KEYS}/host")
    names = [f"process {i} (host {hosts.get(i, 'unknown')})" for i in sorted(processes)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


_closing = threading.Event()
_listeners: list[threading.Thread] = []
preemption = Preemption()
