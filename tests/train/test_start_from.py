"""A run that starts from the parameters of another one."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from spectral_pod import project_files
from spectral_pod.errors import CheckpointError, ConfigError
from spectral_pod.train import loop
from spectral_pod.train.optim import evaluated
from spectral_pod.train.trainer import Trainer
from tests import trainer
from tests.tiny_run import tiny_config, write_run

OVERRIDES = {
    "data.task": "copy", "data.options": {"length": 4}, "data.seq_len": 32,
    "model.num_layers": 1, "train.total_steps": 3, "train.global_batch_size": 4,
    "train.eval_batch_size": 4, "train.eval_records": 4, "train.eval_split": "validation",
    "train.sample_bytes": 0, "train.eval_every_steps": 3, "checkpoint.every_steps": 3,
    "optimizer.warmup_steps": 1, "train.log_every_steps": 1,
}  # fmt: skip


def small(**overrides):
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    config = tiny_config(**{k: v for k, v in (OVERRIDES | given).items() if k != "data.options"})
    config.data.options = type(config.data.options)((OVERRIDES | given)["data.options"])
    return config


def flat(params):
    return {jax.tree_util.keystr(k): np.asarray(x)
            for k, x in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip


@pytest.fixture
def initial(monkeypatch):
    """The states that trainers begin with."""
    found, initialize = [], Trainer.initialize

    def noted(self):
        initialize(self)
        found.append(jax.tree.map(np.asarray, self.state))

    monkeypatch.setattr(Trainer, "initialize", noted)
    return found


def origin(workdir):
    return [
        line.get("start_from")
        for line in project_files.Log(
            epath.Path(workdir) / "starts.jsonl", project_files.START
        ).lines
    ]


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_it_starts_from_what_the_other_run_uses(tmp_path, initial, average):
    """Parameters, or their average, of the newest step; a fresh optimizer; step 0."""
    theirs = small(optimizer__average=average)
    loop.run(theirs, str(tmp_path / "a"))
    ours = small(train__start_from=str(tmp_path / "a"), model__dropout=0.1, optimizer__average=0.5)
    loop.run(ours, str(tmp_path / "b"))
    random, started = initial
    with_average = _last(tmp_path / "a", theirs)
    expected = flat(evaluated(with_average))
    for name, x in flat(started.params).items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    assert any((x != flat(random.params)[name]).any() for name, x in expected.items())
    if average:
        assert any((x != flat(with_average.params)[name]).any() for name, x in expected.items())
    assert started.step == 0
    np.testing.assert_array_equal(
        [x.sum() for x in flat(started.opt_state.average).values()],
        [x.sum() for x in flat(started.params).values()],
    )
    (recorded,) = origin(tmp_path / "b")
    run = project_files.run_id(project_files.RUN.read(epath.Path(tmp_path) / "a/config.json"))
    assert recorded == {
        "workdir": str(tmp_path / "a"), "run": run, "step": 3,
        "differences": ["config.model.dropout is 0.0 there, and 0.1 here"],
    }  # fmt: skip


def _last(workdir, config):
    """The last state of a run."""
    states, restore = [], Trainer.restore

    def noted(self):
        found = restore(self)
        states.append(jax.tree.map(np.asarray, self.state))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "restore", noted)
        loop.run(config, str(workdir), eval_only=True)
    return states[0]


def test_a_restart_goes_on_from_its_own_checkpoint(tmp_path, initial, capfd):
    """Of step 0, even if the other run has gone."""
    write_run(tmp_path / "a", small(), steps=(2, 5))
    config = small(train__start_from=str(tmp_path / "a"))

    def interrupted(self):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.run(config, str(tmp_path / "b"))
    assert f"parameters of step 5 of {tmp_path}/a" in capfd.readouterr().out
    (tmp_path / "a").rename(tmp_path / "gone")
    interrupted_once = loop.run(config, str(tmp_path / "b"))
    assert len(initial) == 1
    assert [bool(x) for x in origin(tmp_path / "b")] == [True, False]
    (tmp_path / "gone").rename(tmp_path / "a")
    whole = loop.run(config, str(tmp_path / "c"))
    assert whole["params_digest"] == interrupted_once["params_digest"]
    plain = loop.run(small(), str(tmp_path / "d"))
    assert plain["params_digest"] != whole["params_digest"]


def test_another_start_is_another_run(tmp_path):
    write_run(tmp_path / "a", small())
    loop.run(small(train__start_from=str(tmp_path / "a")), str(tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"config\.train\.start_from: '.*' there, '' now"):
        loop.run(small(), str(tmp_path / "b"))


def test_what_cannot_be_started_from(tmp_path):
    write_run(tmp_path / "a", small())
    other_model = (
        r"start_from: checkpoint .*/a/checkpoints/1 is of another model;"
        r"[^\0]*params/[^\0]*checkpoint float32.*16.*, model float32.*32"
    )
    no_run = r"start_from is '.*', which is no workdir of a run: it has no config\.json"
    for overrides, error, message in [
        ({"model__hidden_dim": 32}, CheckpointError, other_model),
        ({"train__start_from": str(tmp_path)}, ConfigError, no_run),
    ]:
        config = small(**{"train__start_from": str(tmp_path / "a")} | overrides)
        with pytest.raises(error, match=message):
            loop.run(config, str(tmp_path / "b"))  # the same workdir, which is not taken
    seal = next((tmp_path / "a/seals").iterdir())
    seal.unlink()
    with pytest.raises(CheckpointError, match=r"start_from: .*/a/checkpoints holds no sound check"):
        loop.run(small(train__start_from=str(tmp_path / "a")), str(tmp_path / "b"))


@pytest.mark.slow
def test_two_processes_start_alike(tmp_path):
    """From a run of one process, onto parameters that two of them share."""
    from tests.multiprocess.test_two_processes import command, outputs_of_two

    trainer.run(command(tmp_path / "a", 1))
    start = f"train.start_from={tmp_path}/a"
    trainer.run(command(tmp_path / "one", 1, start, "mesh.fsdp=1"))
    (tmp_path / "logs").mkdir()
    outputs_of_two(command(tmp_path / "two", 2, start, "mesh.fsdp=2"), tmp_path / "logs")
    assert origin(tmp_path / "two")[0]["step"] == 10
    assert origin(tmp_path / "two") == origin(tmp_path / "one")
    one, two = (
        json.loads((tmp_path / name / "result.json").read_text())["eval"]["loss"]
        for name in ("one", "two")
    )
    assert one == pytest.approx(two, rel=1e-4)
