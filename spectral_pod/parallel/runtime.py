"""The processes of a run: joining them and meeting at named points."""

import glob
import os
import signal
from typing import Any

import jax
from jax._src import distributed

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd")  # TPUs and GPUs


def initialize(coordinator_address: str | None, num_processes: int, process_id: int) -> None:
    """Joins `num_processes` processes; one process without a coordinator needs nothing."""
    if not (os.environ.get("JAX_PLATFORMS") or any(map(glob.glob, _ACCELERATORS))):
        # libtpu, installed to compile for TPUs elsewhere, would look for one here, complain at
        # length, and bring down JAX's profiler.
        jax.config.update("jax_platforms", "cpu")
    if coordinator_address:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)


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


def is_leader() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """One line to the user, from the leader only."""
    if is_leader():
        print(line, flush=True)


def barrier(name: str, timeout_s: int = 3600) -> None:
    """Waits for every process to arrive at `name`; fails naming it after `timeout_s` seconds."""
    if jax.process_count() == 1:
        return
    client: Any = distributed.global_state.client
    client.wait_at_barrier(name, timeout_in_ms=timeout_s * 1000)
