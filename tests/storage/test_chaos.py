"""A run with thirty random faults ends with the same parameters as an undisturbed run.

    launch/test.sh -n 0 -s -m slow tests/storage/test_chaos.py        (about 15 minutes)

CHAOS_SEED selects the random sequence of faults; CHAOS_FAULTS sets their number, 30 by default.
"""

import collections
import contextlib
import os
import random
import re
import shutil
import signal
import statistics
import time

import numpy as np
import pytest

from tests import tiny_run, trainer
from tests.multiprocess import cluster as cluster_lib
from tests.multiprocess.cluster import Cluster, gone, seconds_until_gone, unsealed

pytestmark = pytest.mark.slow

STEPS, EVAL_EVERY, LATE_EVERY = 330, 55, 40
OPTIONS = (
    f"train.total_steps={STEPS}", f"train.eval_every_steps={EVAL_EVERY}",
    "data.options.validation=512", "checkpoint.keep_latest=3", "train.global_batch_size=24",
    "train.eval_batch_size=48", "train.compilation_cache=True",
)  # fmt: skip
LATE = {"LATE_DATA": f"{LATE_EVERY}:1.5"}
AS_USERS_HAVE_IT = {"PYTHONPATH": str(trainer.ROOT)}  # with TensorFlow
NUM_FAULTS = int(os.environ.get("CHAOS_FAULTS", "30"))
SURVIVES, BUDGET = 15.0, 30.0  # seconds until all have exited: after a peer's death, after SIGTERM
RESTART = {75, 76, 77, 128 + signal.SIGABRT, 128 + signal.SIGKILL, 128 + signal.SIGTERM}


class Chaos:
    """Injects faults into a cluster whose run continues, and records the effect of each."""

    def __init__(self, cluster, rng, proxy=None):
        self.cluster, self.rng, self.proxy = cluster, rng, proxy
        self.report = []

    def do(self, kind, step):
        """Injects a fault once the run has reached `step`, and waits until training continues.

        The first step is the earliest: before it a process may not be one of the run yet.
        """
        c = self.cluster
        c.wait_until(lambda: max(1, min(step, STEPS - 2)) <= c.step(), 240)
        getattr(self, kind)()

    def _record(self, kind, lived, limit, started, running):
        """Records a fault once the run has started more often than `running` times."""
        c = self.cluster
        at = c.step()
        assert max(lived) <= limit, f"{kind}: lived for {lived} s\n" + "\n\n".join(c.tails())
        c.wait_until(lambda: self._running() > running or self._is_over(), 240)
        back = time.monotonic() - started
        self.report.append((kind, c.num_processes, at, max(lived), back))
        print(f"  {kind:15} step {at:3}  gone in {max(lived):5.1f} s  again in {back:5.1f} s")

    def _running(self):
        return self.cluster.text().count("starting at step")

    def _is_over(self):
        return all(supervisor.poll() is not None for supervisor in self.cluster.supervisors)

    def _die(self, kind, victim, signum, limit, before=lambda: None, all_go=True):
        """Sends `signum` to one of the trainers; all of them must then exit."""
        before()
        pids = self.cluster.wait_until(self._all_trainers)
        started, running = time.monotonic(), self._running()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[victim], signum)
        lived = seconds_until_gone(pids if all_go else [pids[victim]], limit + 10)
        self._record(kind, lived, limit, started, running)

    def _all_trainers(self):
        pids = self.cluster.trainers()
        return pids if all(pids) else None

    def _any(self):
        return self.rng.randrange(self.cluster.num_processes)

    def _last(self):
        return self.cluster.num_processes - 1

    # ---- kills

    def kill_worker(self):
        self._die("kill worker", self._last(), signal.SIGKILL, SURVIVES)

    def kill_leader(self):
        self._die("kill coordinator", 0, signal.SIGKILL, SURVIVES)

    def kill_in_save(self):
        self._die("kill in a save", self._any(), signal.SIGKILL, SURVIVES, self._until_save)

    def stop_one(self):
        """A process hangs: the others exit, and once it is resumed, it exits too."""
        pids, victim = self.cluster.wait_until(self._all_trainers), self._any()
        started, running = time.monotonic(), self._running()
        os.kill(pids[victim], signal.SIGSTOP)
        others = [pid for pid in pids if pid != pids[victim]]
        lived = seconds_until_gone(others, SURVIVES + 10)
        os.kill(pids[victim], signal.SIGCONT)
        seconds_until_gone([pids[victim]], SURVIVES)
        self._record("SIGSTOP", lived, SURVIVES, started, running)

    # ---- SIGTERM in every phase

    def term_at_start(self):
        """In the first seconds of a start, which follows a stop of all processes. Processes that
        wait for this one to join continue to wait.
        """
        c = self.cluster
        for supervisor in c.supervisors:
            supervisor.terminate()
        assert set(c.wait(60)) <= RESTART, c.tails()
        c.start()
        time.sleep(self.rng.uniform(0, 4))
        self._die("SIGTERM: start", self._any(), signal.SIGTERM, BUDGET, all_go=False)

    def term_in_compile(self):
        """Between the last line of the start and the first step, after the death of a process."""
        before = self._running()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.cluster.wait_until(self._all_trainers)[0], signal.SIGKILL)
        self.cluster.wait_until(lambda: self._running() > before, 240)
        time.sleep(self.rng.uniform(0, 0.5))
        self._die("SIGTERM: compile", self._any(), signal.SIGTERM, BUDGET)

    def term_in_data(self):
        self._die("SIGTERM: data", self._any(), signal.SIGTERM, BUDGET, self._until_late_data)

    def term_in_step(self):
        pause = self.rng.uniform(0, 0.3)
        self._die("SIGTERM: step", self._any(), signal.SIGTERM, BUDGET, lambda: time.sleep(pause))

    def term_in_eval(self):
        self._die("SIGTERM: eval", self._any(), signal.SIGTERM, BUDGET, self._until_eval)

    def term_in_save(self):
        self._die("SIGTERM: save", self._any(), signal.SIGTERM, BUDGET, self._until_save)

    # ---- faults that need not end a process

    def slow_host(self):
        pids = self.cluster.wait_until(self._all_trainers)
        cluster_lib.signal_slowly(pids[self._any()], 4)
        time.sleep(0.5)
        assert not any(map(gone, pids)), "\n\n".join(self.cluster.tails())
        self.report.append(("slow host", len(pids), self.cluster.step(), 0.0, 0.0))
        print(f"  slow host       step {self.cluster.step():3}  nobody left")

    def outage(self):
        pids = self.cluster.wait_until(self._all_trainers)
        self.proxy.set(outage_s=12, preconditions=True)
        time.sleep(14)
        assert not any(map(gone, pids)), "\n\n".join(self.cluster.tails())
        self.report.append(("storage outage", len(pids), self.cluster.step(), 0.0, 0.0))
        print(f"  storage outage  step {self.cluster.step():3}  nobody left")

    def other_config(self):
        """A host with another configuration: training does not start, and the host is named."""
        c = self.cluster
        for supervisor in c.supervisors:
            supervisor.terminate()
        assert set(c.wait(60)) <= RESTART, c.tails()
        started = time.monotonic()
        c.start(of_one=["--config.train.label_smoothing=0.1"])
        assert c.wait(120) == [2] * c.num_processes, c.tails()
        took = time.monotonic() - started
        odd = f"process {self._last()} (host"
        for i in range(c.num_processes):
            assert odd in c.text(i)
            assert "config.train.label_smoothing is 0.1, not 0.0" in c.text(i)
        self.report.append(("another config", c.num_processes, 0, took, took))
        print(f"  another config  all ended with 2 in {took:.1f} s")
        c.start()

    def other_hosts(self):
        """The same workdir is continued by another number of processes and devices."""
        c = self.cluster
        for supervisor in c.supervisors:
            supervisor.terminate()
        assert set(c.wait(60)) <= RESTART, c.tails()
        others = [(2, 1), (3, 1), (4, 1), (1, 4), (2, 2)]
        others.remove((c.num_processes, c.num_devices))
        c.num_processes, c.num_devices = self.rng.choice(others)
        started = time.monotonic()
        c.start()
        c.wait_until(self._running, 240)
        back = time.monotonic() - started
        self.report.append(("other hosts", c.num_processes, c.step(), 0.0, back))
        print(f"  other hosts     {c.num_processes} x {c.num_devices}, again in {back:.1f} s")

    # ---- waiting for phases of a run

    def _until_late_data(self):
        """The batch of step k * LATE_EVERY is late; by then the line of the step before the last
        has been printed."""
        at = LATE_EVERY - 2
        c = self.cluster
        with contextlib.suppress(AssertionError):
            c.wait_until(lambda: c.step() % LATE_EVERY == at or self._is_over(), 30)
        time.sleep(self.rng.uniform(0.1, 1.0))

    def _until_eval(self):
        c = self.cluster
        evaluations = len(re.findall("validation: ", c.text()))
        with contextlib.suppress(AssertionError):
            c.wait_until(
                lambda: c.step() % EVAL_EVERY == 0 and c.step() and not self._is_over(), 30
            )
        time.sleep(self.rng.uniform(0, 0.3))
        assert len(re.findall("validation: ", c.text())) - evaluations <= 1

    def _until_save(self):
        c = self.cluster
        if not str(c.workdir).startswith("gs://"):
            with contextlib.suppress(AssertionError):
                c.wait_until(lambda: unsealed(c.workdir) or self._is_over(), 30)


ON_DISK = (
    "kill_worker", "kill_leader", "kill_in_save", "stop_one", "term_at_start", "term_in_compile",
    "term_in_data", "term_in_step", "term_in_eval", "term_in_save", "slow_host", "other_config",
)  # fmt: skip
ON_STORAGE = ("outage", "other_hosts", "kill_worker", "other_hosts", "kill_leader", "term_in_step")


def drawn(rng, kinds, count):
    """Every kind at least once and further random ones, in random order."""
    chosen = [*kinds[:count], *rng.choices(kinds, k=max(0, count - len(kinds)))]
    rng.shuffle(chosen)
    return chosen


def run_with_faults(cluster, rng, kinds, proxy=None):
    """Runs with these faults, evenly spaced over the steps; returns the effect of each."""
    chaos = Chaos(cluster, rng, proxy)
    cluster.start()
    for i, kind in enumerate(kinds):
        chaos.do(kind, int((i + rng.random()) * STEPS * 0.97 / len(kinds)))
    assert set(cluster.wait(300)) == {0}, "\n\n".join(cluster.tails())
    return chaos.report


def test_thirty_faults(tmp_path, proxy, bucket):
    seed = int(os.environ.get("CHAOS_SEED", time.time_ns() % 10**6))
    rng = random.Random(seed)
    print(f"\nCHAOS_SEED={seed}")
    num_on_storage = NUM_FAULTS // 4
    report = []

    print("the same 2 processes of 2 devices, on disk:")
    options = (*OPTIONS, "mesh.fsdp=2")
    with Cluster(tmp_path / "still", tmp_path / "still/run", *options, num_devices=2) as still:
        still.start()
        assert still.wait(300) == [0, 0], "\n\n".join(still.tails())
    kinds = drawn(rng, ON_DISK, NUM_FAULTS - num_on_storage)
    folder = tmp_path / "disk"
    with Cluster(folder, folder / "run", *options, num_devices=2, env=AS_USERS_HAVE_IT | LATE) as c:
        report += run_with_faults(c, rng, kinds)
    trainer.assert_same_run(folder / "run", tmp_path / "still/run")

    print("other numbers of processes and devices, in storage:")
    kinds = drawn(rng, ON_STORAGE, num_on_storage)
    proxy.set(preconditions=True)
    variables = dict(v.split("=", 1) for v in proxy.used_by([])[1:])
    options = (*OPTIONS, "checkpoint.every_steps=30")  # saves to storage take seconds
    with Cluster(
        tmp_path / "storage", f"{bucket.url}/run", *options, env=AS_USERS_HAVE_IT | variables
    ) as c:
        report += run_with_faults(c, rng, kinds, proxy)
    reference = parameters(tmp_path / "still/run")
    for name, value in parameters(bucket.download("run", tmp_path / "downloaded")).items():
        difference = np.linalg.norm(value - reference[name])
        assert difference <= 1e-5 * np.linalg.norm(reference[name]), name
    print_report(report)
    shutil.rmtree(tmp_path)


def parameters(workdir):
    return tiny_run.parameters(workdir, cluster_lib.get_config(), STEPS)


def print_report(report):
    """Prints a table of the effects of faults, by kind."""
    by_kind = collections.defaultdict(list)
    for kind, *figures in report:
        by_kind[kind].append(figures)
    print(f"{len(report)} faults; seconds until every process was gone, and until it ran again:")
    for kind in sorted(by_kind):
        lived, back = ([f[k] for f in by_kind[kind]] for k in (2, 3))
        print(
            f"| {kind} | {len(lived)} | {statistics.median(lived):.1f} | {max(lived):.1f} "
            f"| {statistics.median(back):.1f} |"
        )
