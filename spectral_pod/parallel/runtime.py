"""The processes of a run: joining them and meeting at named points."""

import glob
import os
from typing import Any

import jax
from jax._src import distributed


def initialize(coordinator_address: str | None, num_processes: int, process_id: int) -> None:
    """Joins `num_processes` processes; one process without a coordinator needs nothing."""
    if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*"):
        # No TPU here: libtpu, installed to compile for one elsewhere, would complain at length.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if coordinator_address:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)


def is_leader() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str, timeout_s: int = 3600) -> None:
    """Waits for every process to arrive at `name`; fails naming it after `timeout_s` seconds."""
    if jax.process_count() == 1:
        return
    client: Any = distributed.global_state.client
    client.wait_at_barrier(name, timeout_in_ms=timeout_s * 1000)
