"""A pod on this machine: supervised trainer processes on loopback, and faults for them.

This file is also the config of those runs: `tests/trainer.py`, optionally with data that are
sometimes late or with a slow host.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import time

import psutil
from ml_collections import ConfigDict

from tests import processes, trainer

CONFIG = "tests/multiprocess/cluster.py"


def get_config() -> ConfigDict:
    if late := os.environ.get("LATE_DATA"):  # "EVERY:SECONDS"
        every, seconds = late.split(":")
        _delay_batches(int(every), float(seconds))
    if seconds := os.environ.get("SLOW_HOST"):  # for itself, before every step
        _pause_before_steps(float(seconds))
    c = trainer.get_config()
    c.data.options.validation = 64
    c.data.threads, c.data.prefetch = 1, 1  # so that late data are waited for
    c.train.grad_accumulation = 1
    c.train.log_every_steps = 1
    c.train.stall_factor = 0.0
    c.checkpoint.every_steps = 10
    return c


def _delay_batches(every: int, seconds: float) -> None:
    from spectral_pod.data import pipeline

    rows = pipeline.Batches.rows

    def late_rows(self, step, which):
        if step % every == every - 1:
            time.sleep(seconds)
        return rows(self, step, which)

    pipeline.Batches.rows = late_rows


def _pause_before_steps(seconds: float) -> None:
    from spectral_pod.data import pipeline

    load = pipeline.load

    def slow_load(*args, **options):  # late rows may be read ahead, while the others are slow
        for batch in load(*args, **options):
            time.sleep(seconds)
            yield batch

    pipeline.load = slow_load


class Cluster:
    """`num_processes` trainers of `num_devices` devices each, for one workdir."""

    def __init__(self, folder, workdir, *options, num_processes=2, num_devices=1, env=()):
        self.folder, self.workdir = pathlib.Path(folder), workdir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.options, self.num_devices, self.env = options, num_devices, dict(env)
        self.num_processes = num_processes
        self._starts = 0
        self.supervisors = []
        self.logs = []

    def start(self, supervised=True, of_one=(), env_of_one=(), forked=True):
        """Starts all processes; the last one also with the options and the environment `of_one`."""
        address, self._starts = f"127.0.0.1:{free_port()}", self._starts + 1
        flags = processes.xla_flags(self.num_devices)
        env = (
            trainer.environment() | {"XLA_FLAGS": flags, "SUPERVISE_QUICK_SECONDS": "0"} | self.env
        )
        self.logs = [
            self.folder / f"start-{self._starts}-process-{i}.log" for i in range(self.num_processes)
        ]
        self.supervisors = []
        for i, log in enumerate(self.logs):
            last = i == self.num_processes - 1
            command = [
                *trainer.command(self.workdir, *self.options, config=CONFIG),
                *(of_one if last else ()),
                f"--coordinator_address={address}",
                f"--num_processes={self.num_processes}", f"--process_id={i}",
            ]  # fmt: skip
            supervise = ["bash", "launch/supervise.sh", "--"] if supervised else []
            popen = subprocess.Popen if supervised or not forked else processes.Popen
            with open(log, "w") as file:
                self.supervisors.append(
                    popen(
                        supervise + command,
                        cwd=trainer.ROOT,
                        env=env | dict(env_of_one if last else ()),
                        stdout=file,
                        stderr=file,
                    )
                )
        self._supervised = supervised

    def trainers(self):
        """The pid of each process's running trainer, or None."""
        if not self._supervised:
            return [p.pid if p.poll() is None else None for p in self.supervisors]
        return [_trainer_of(supervisor.pid) for supervisor in self.supervisors]

    def text(self, process=0):
        return self.logs[process].read_text()

    def step(self):
        """The last step that the leader printed since the cluster was started."""
        steps = re.findall(r"^step (\d+)/", self.text(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def wait_until(self, condition, seconds=120):
        """Returns `condition()` once it is true; fails with the logs after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "\n\n".join(self.tails())
            time.sleep(0.01)
        return value

    def wait(self, seconds=240):
        """The exit code of each process."""
        deadline = time.monotonic() + seconds
        for supervisor in self.supervisors:
            try:
                supervisor.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError("\n\n".join(self.tails())) from None
        return [supervisor.returncode for supervisor in self.supervisors]

    def tails(self):
        return [f"{log}:\n{log.read_text()[-3000:]}" for log in self.logs]

    def kill(self):
        """Ends everything, at the end of a test."""
        for supervisor in self.supervisors:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(supervisor.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            supervisor.kill()
            supervisor.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def gone(pid):
    """Whether a process has ended (a zombie has)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def seconds_until_gone(pids, limit):
    """The seconds until each process has ended; `limit` for those that take longer."""
    started, left, lived = time.monotonic(), set(pids), {}
    while left and time.monotonic() - started < limit:
        for pid in list(left):
            if gone(pid):
                left.remove(pid)
                lived[pid] = time.monotonic() - started
        time.sleep(0.01)
    return [lived.get(pid, limit) for pid in pids]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def unsealed(workdir):
    """The checkpoints in a folder that are being written."""
    folder = pathlib.Path(workdir)
    steps = {path.name for path in (folder / "checkpoints").glob("*")}
    return steps - {path.stem for path in (folder / "seals").glob("*.json")}


def signal_slowly(pid, seconds):
    """A slow host: stopped nine tenths of the time."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.18)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)


def starts(workdir):
    return [json.loads(line) for line in (pathlib.Path(workdir) / "starts.jsonl").open()]


def _trainer_of(supervisor):
    try:
        for child in psutil.Process(supervisor).children():
            if any("spectral_pod.main" in part for part in child.cmdline()):
                return child.pid
    except psutil.NoSuchProcess:
        pass
    return None
