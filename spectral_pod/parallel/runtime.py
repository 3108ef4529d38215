"""The processes of a run: joining, named barriers, preemption, and exiting together.

JAX's coordination service in process 0 joins the processes and detects dead ones by missing
heartbeats. This file adds the message that a process broadcasts before it exits, so that all
processes exit with the same code and name the one at fault. The codes are in `errors.py`.
"""

import atexit
import collections
import contextlib
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
from jax._src import cloud_tpu_init, distributed  # the key-value store has no public API
from jax.experimental import multihost_utils

from spectral_pod.errors import ConfigError, LostPeerError, Preempted, TimeUp
from spectral_pod.parallel import backend

_HEARTBEAT_SECONDS = 10  # without heartbeats, after which a process counts as dead
_JOIN_SECONDS = 300  # time limit for all processes to join
_BROADCAST_SECONDS = 1.0  # for a broadcast to reach all; process 0 serves it before it exits
_CLOSE_SECONDS = 15.0  # for a process that is closing, to seal a checkpoint for example
_KEYS = "spectral_pod"
_PREEMPTION_KEY = "RECEIVED_PREEMPTION_NOTICE"  # of JAX's preemption service

# Texts by which errors of collectives, barriers and the coordination service show the loss of a
# peer. None of them occurs in an error of storage.
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
    """Joins the processes of a run; to be called before any other use of JAX.

    The processes are described by the arguments, or by the environment variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_COORDINATOR_BIND_ADDRESS;
    otherwise JAX asks SLURM, or the metadata of Cloud TPU and GKE. Without any of these the run
    has one process.

    Args:
      coordinator_address: host:port on which process 0 serves the others.
      bind_address: ip:port that it listens on; the default is the coordinator's address.

    Raises:
      ConfigError: the arguments contradict each other, or the platform does not describe the run.
      LostPeerError: not all processes joined in time.
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = num_processes if num_processes is not None else _env_int("JAX_NUM_PROCESSES")
    index = process_id if process_id is not None else _env_int("JAX_PROCESS_ID")
    backend.leave_out_absent_tpus()
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
    atexit.register(_disconnect)
    _client().key_value_set(f"{_KEYS}/host/{this_process()}", socket.gethostname())
    _watch_key(_PREEMPTION_KEY, lambda _: preemption.on_notice())
    on_broadcast("ended", _exit_with_peer)


def _disconnect() -> None:
    """Disconnects, and ends the listening threads: one inside JAX would abort Python's exit."""
    if _client() is not None:
        jax.distributed.shutdown()  # waits for the other processes; wakes the listeners
        for listener in _listeners:
            listener.join(_BROADCAST_SECONDS)


def this_process() -> int:
    """The index of this process in the run. Uses no device, as devices may hang."""
    return distributed.global_state.process_id


def num_processes() -> int:
    """The number of processes that joined."""
    return distributed.global_state.num_processes


def is_leader() -> bool:
    """Whether this is the leader process, which writes what a run writes once."""
    return jax.process_index() == 0


def print_once(line: str) -> None:
    """Prints a line, on the leader process only."""
    if is_leader():
        print(line, flush=True)


def barrier(name: str, timeout_s: float = 3600) -> None:
    """Waits until all processes have reached the barrier `name`.

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
    """Checks that all processes have the same facts; otherwise they would hang or train nonsense.

    Raises:
      ConfigError: on all processes; names those that differ from the majority, and the facts.
      LostPeerError: a process did not send its facts in time.
    """
    if num_processes() == 1:
        return
    client, here = _client(), f"{_KEYS}/facts/{name}"
    client.key_value_set(f"{here}/{this_process()}", json.dumps(dict(facts)))
    barrier(f"facts of {name}", timeout_s)
    if this_process() == 0:
        sent = {process: json.loads(text) for process, text in _by_process(here).items()}
        client.key_value_set(f"{_KEYS}/verdict/{name}", json.dumps(differences(sent, _named)))
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
    """A line for each value of a fact that differs from the majority's, with who has it."""
    lines = []
    for field in sorted({field for mine in facts.values() for field in mine}):
        holders = collections.defaultdict(list)
        for index in sorted(facts):
            holders[facts[index].get(field, "nothing")].append(index)
        # In a tie the value of process 0 wins, as it comes first.
        common = max(holders, key=lambda value: len(holders[value]))
        lines += [
            f"  {named(odd)}: {field} is {value}, not {common}"
            for value, odd in holders.items()
            if value != common
        ]
    return lines


def share(name: str, value: str) -> None:
    """Stores `value` of this process for `shared`, without waiting for other processes."""
    if num_processes() > 1:
        key = f"{_KEYS}/shared/{name}/{this_process()}"
        _client().key_value_set(key, value, allow_overwrite=True)


def shared(name: str) -> dict[int, str]:
    """The last value that each process `share`d under this name, of those that did."""
    return _by_process(f"{_KEYS}/shared/{name}")


def broadcast(topic: str, message: str) -> None:
    """Sends a message to all processes; of several on one topic only the first counts."""
    if _client() is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # sent before, or no peer is left
            _client().key_value_set(f"{_KEYS}/{topic}", message)


def on_broadcast(topic: str, callback: Callable[[str], None]) -> None:
    """Calls `callback`, on a thread, with the message of any process on this topic."""
    if _client() is not None:
        _watch_key(f"{_KEYS}/{topic}", callback)


class Preemption:
    """SIGTERM to any process, as clouds and schedulers send it, ends the run with its state saved.

    The processes agree to stop at the same call of `reached`. They exit `seconds` after the signal
    in any case, and at once if there are no unsaved steps. A thread receives the signal, as the
    main thread may spend minutes in a compilation or waiting for data.

    `stop_after` ends the run likewise; no machine goes then, and a step may take its time.
    """

    def __init__(self) -> None:
        self.seconds = 25.0  # of the 30 that a machine has left when it is reclaimed
        self.has_unsaved_steps = False
        self.received = threading.Event()
        self.by_clock = threading.Event()  # `stop_after` is the reason, not a signal
        self._calls = 0

    def listen(self) -> None:
        """Handles SIGTERM from now on; once processes have joined, JAX does."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to before any handler

        def wait_for_signal() -> None:
            while signal.SIGTERM not in os.read(reader, 1):
                pass
            self.on_signal()

        threading.Thread(target=wait_for_signal, name="preemption", daemon=True).start()

    def on_signal(self) -> None:
        """To be called when SIGTERM came, to this or to another process."""
        if not self.has_unsaved_steps:
            self._exit("there is nothing new to save")
        self.received.set()
        late = f"no step ended within {self.seconds:g} s: what was saved before is kept"
        timer = threading.Timer(self.seconds, self._exit, (late,))
        timer.daemon = True
        timer.start()

    def on_notice(self) -> None:
        """To be called when JAX tells all processes of a SIGTERM to one, or of the clock's."""
        if self._is_by_clock():
            self.received.set()
        else:
            self.on_signal()

    def stop_after(self, minutes: float) -> None:
        """Ends the run this long after now, by the clock of process 0."""
        timer = threading.Timer(min(60 * minutes, threading.TIMEOUT_MAX), self._on_time)
        timer.daemon = True
        timer.start()

    def why(self) -> tuple[type[Preempted], str]:
        """Why `reached` has become true."""
        if self._is_by_clock():
            return TimeUp, "--stop_after_minutes is over"
        return Preempted, "SIGTERM came"

    def reached(self, *, together: bool = True) -> bool:
        """Whether to save and exit here.

        Args:
          together: whether all processes make this call, equally often and at equal points; only
            then can several of them agree.
        """
        if num_processes() == 1:
            return self.received.is_set()
        if not together:
            return False
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def _on_time(self) -> None:
        if this_process() != 0 or self.received.is_set() or _closing.is_set():
            return
        self.by_clock.set()
        if not self.has_unsaved_steps:
            message = "TimeUp: --stop_after_minutes is over; there is nothing new to save"
            _tell_why(TimeUp.exit_code, message)
            exit_now(TimeUp.exit_code, message)
        if num_processes() == 1:
            self.received.set()
        else:
            share("by_clock", "")
            os.kill(os.getpid(), signal.SIGTERM)  # of which JAX tells all processes

    def _is_by_clock(self) -> bool:
        if num_processes() > 1 and not self.by_clock.is_set() and shared("by_clock"):
            self.by_clock.set()
        return self.by_clock.is_set()

    def _exit(self, why: str) -> NoReturn:
        exit_now(Preempted.exit_code, f"Preempted: SIGTERM came; {why}")


class Interrupt:
    """Defers Ctrl-C within this context to the next `check`; a second Ctrl-C is immediate.

    Python raises KeyboardInterrupt wherever the signal arrives, and it is lost if that is one of
    JAX's garbage-collection callbacks.
    """

    def __enter__(self) -> "Interrupt":
        self._received = False
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was one."""
        if self._received:
            raise KeyboardInterrupt

    def _on_signal(self, *_: object) -> None:
        self.check()
        self._received = True


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error shows the loss of another process."""
    return num_processes() > 1 and any(sign in str(error) for sign in _PEER_IS_GONE)


@contextlib.contextmanager
def exit_on_peer_loss() -> Iterator[None]:
    """Exits at once when another process is lost. Contexts around this one are not closed, as a
    collective save, for example, would wait for the lost process. Other errors close them."""
    try:
        yield
    except BaseException as error:
        new = not _closing.is_set()  # these contexts are nested
        _closing.set()
        if is_peer_loss(error):
            end(LostPeerError.exit_code, f"LostPeerError: {error}")
        by_jax = any(isinstance(e, jax.errors.JaxRuntimeError) for e in (error, error.__cause__))
        if new and by_jax and num_processes() > 1:
            # The text does not show it, but a peer may be dead: then JAX ends this process as soon
            # as heartbeats are missing.
            time.sleep(_HEARTBEAT_SECONDS + _BROADCAST_SECONDS)
        raise


def end(code: int, message: str) -> NoReturn:
    """Ends the run: broadcasts the reason to all processes, then exits.

    Skips JAX's exit handlers, which wait for processes that may be dead.
    """
    if _client() is None:
        print(message, file=sys.stderr, flush=True)
        # Python joins its threads at exit, and one of a library whose files fail may never end.
        late = threading.Timer(_CLOSE_SECONDS, os._exit, (code,))
        late.daemon = True
        late.start()
        sys.exit(code)
    if code == LostPeerError.exit_code:
        time.sleep(_BROADCAST_SECONDS)  # if the peer sent its reason, `_exit_with_peer` ends this
        if preemption.received.is_set():
            # The peer exited first, for the same reason.
            code = (TimeUp if preemption.by_clock.is_set() else Preempted).exit_code
    elif code not in (Preempted.exit_code, TimeUp.exit_code):  # to which all processes agreed
        _tell_why(code, message)
    exit_now(code, message)


def _tell_why(code: int, message: str) -> None:
    """Tells the other processes, which then exit likewise."""
    reason = {"process": this_process(), "code": code, "message": message}
    broadcast("ended", json.dumps(reason))


def exit_now(code: int, message: str) -> NoReturn:
    """Ends this process, whatever its threads are doing."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if _client() is not None and distributed.global_state.service is not None:
        time.sleep(_BROADCAST_SECONDS)  # this process serves the broadcast
    os._exit(code)


def _exit_with_peer(message: str) -> None:
    """Exits as the process did that ended the run."""
    reason = json.loads(message)
    if reason["process"] != this_process():
        if _closing.is_set():  # this process ends too, and may be sealing a checkpoint
            time.sleep(_CLOSE_SECONDS)
        why = f"{_named([reason['process']])} ended the run: {reason['message']}"
        exit_now(reason["code"], why)


def _watch_key(key: str, callback: Callable[[str], None]) -> None:
    """Calls `callback`, on a thread, with the value of `key` once it has one."""

    client = _client()

    def wait() -> None:
        while True:
            try:
                value = client.blocking_key_value_get(key, 3_600_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                return  # the coordinator is lost: JAX ends this process
            return callback(value)

    _listeners.append(threading.Thread(target=wait, name=f"watch {key}", daemon=True))
    _listeners[-1].start()


def _is_managed() -> bool:
    """Whether a platform started this process that describes the run to JAX."""
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
    """JAX's client of the coordination service; None in a run of a single process."""
    return distributed.global_state.client


def _by_process(keys: str) -> dict[int, str]:
    """The values below `keys`, by the process that set each."""
    return {int(k.rsplit("/", 1)[1]): value for k, value in _client().key_value_dir_get(keys)}


def _named(processes: Iterable[int]) -> str:
    """'process 1 (host a), process 2 (host b)'; the first few of many."""
    hosts = _by_process(f"{_KEYS}/host")
    names = [f"process {i} (host {hosts.get(i, 'unknown')})" for i in sorted(processes)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


_closing = threading.Event()
_listeners: list[threading.Thread] = []
preemption = Preemption()
