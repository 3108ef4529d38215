"""Two processes end together, for the same reason and soon; thirty faults in a row are the slow
`tests/storage/test_chaos.py`.
"""

import os
import re
import signal
import statistics

import pytest

from tests import trainer
from tests.multiprocess.cluster import Cluster, seconds_until_gone, starts

OPTIONS = ("train.total_steps=2000", "train.eval_every_steps=1000")


@pytest.fixture
def cluster(tmp_path):
    """Starts two processes that train, each ended by its own exit code."""
    opened = []

    def start(*options, until_step=0, **of_one):
        opened.append(Cluster(tmp_path, tmp_path / "run", *OPTIONS, *options))
        opened[0].start(supervised=False, **of_one)
        opened[0].wait_until(lambda: opened[0].step() >= until_step)
        return opened[0]

    yield start
    opened[0].kill()


def test_sigterm_to_one_saves_the_step_of_all_and_one_process_goes_on(cluster, tmp_path):
    two = cluster(until_step=12, env_of_one={"SLOW_HOST": "0.2"}, forked=False)
    os.kill(two.supervisors[1].pid, signal.SIGTERM)
    assert two.wait(30) == [75, 75]  # the budget of 25 s, and leaving
    saved = [re.search(r"SIGTERM came; step (\d+) is saved", two.text(i))[1] for i in range(2)]
    assert saved[0] == saved[1]
    assert (tmp_path / f"run/seals/{saved[0]}.json").exists()
    lines = [line for line in trainer.metrics(tmp_path / "run") if "host/slowest" in line]
    assert all({"host/0/p50_seconds", "host/1/p50_seconds"} <= line.keys() for line in lines)
    assert statistics.median(line["host/slowest"] for line in lines) == 1
    waits = [statistics.median(line[f"host/{i}/p50_seconds"] for line in lines) for i in (0, 1)]
    assert waits[0] < 0.1 < 0.2 <= waits[1]
    with Cluster(
        tmp_path / "one", tmp_path / "run", *OPTIONS, num_processes=1, num_devices=2
    ) as one:
        one.start(supervised=False)
        one.wait_until(lambda: one.step() > int(saved[0]))
        assert f"starting at step {saved[0]}\n" in one.text()
        assert "processes changed since the last start: 2 before, 1 now" in one.text()
        os.kill(one.supervisors[0].pid, signal.SIGTERM)
        assert one.wait(30) == [75]
    assert [start["processes"] for start in starts(tmp_path / "run")] == [2, 1]
    lines = [line["step"] for line in trainer.curves(tmp_path / "run") if "train/loss" in line]
    assert lines == sorted(set(lines))  # every step once


def test_the_clock_of_the_first_ends_both_at_one_step(tmp_path):
    env = {"TIME_IS_UP_AT": "12"}
    with Cluster(tmp_path, tmp_path / "run", *OPTIONS, env=env) as two:
        two.start(supervised=True, env_of_one={"SLOW_HOST": "0.05"})
        assert two.wait() == [78, 78]  # once: a supervisor starts neither again
        said = [
            re.findall(r"^TimeUp: --stop_after_minutes is over; step (\d+) is saved", text, re.M)
            for text in map(two.text, range(2))
        ]
    (saved,), theirs = said
    assert theirs == [saved]
    assert int(saved) >= 12
    assert (tmp_path / f"run/seals/{saved}.json").exists()
    assert [start["step"] for start in starts(tmp_path / "run")] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_survivor_leaves_the_dead(cluster, victim):
    two = cluster(until_step=12)
    two.supervisors[victim].kill()
    assert max(seconds_until_gone([process.pid for process in two.supervisors], 30)) < 15
    # 134: JAX's runtime aborts a process whose coordinator is gone.
    assert two.wait(1)[1 - victim] in (76, -signal.SIGABRT)


def test_a_host_with_another_configuration_is_named_everywhere(cluster):
    two = cluster(of_one=["--config.optimizer.clip_norm=2.0"])
    assert two.wait(60) == [2, 2]
    for i in range(2):
        assert re.search(
            r"process 1 \(host .+\): config.optimizer.clip_norm is 2.0, not 1.0", two.text(i)
        )


def test_a_hang_is_ended_and_every_thread_of_every_host_told(cluster, tmp_path):
    watched = ("train.stall_seconds=10.0", "train.stall_factor=5.0")
    two = cluster(*watched, env_of_one={"LATE_DATA": "8:1000"})
    assert two.wait(60) == [77, 77]
    stacks = sorted((tmp_path / "run/stalls").iterdir())
    assert [file.name[-5:] for file in stacks] == ["0.txt", "1.txt"]
    assert ["late_rows" in file.read_text() for file in stacks] == [False, True]
    shown = trainer.event_points(tmp_path / "run")
    assert {("train", "stall/process_0"), ("train", "stall/process_1")} <= shown.keys()
