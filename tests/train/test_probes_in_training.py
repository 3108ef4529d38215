"""Probes within a training: they change nothing, and say what the step after them does."""

import functools
import importlib.util

import jax
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.errors import UserError
from spectral_pod.generate.restore import one_device
from spectral_pod.objectives import NextByte
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.train import loop, probe_plots
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.probes import probe_step, read_history, scalars
from spectral_pod.train.state import abstract_state
from spectral_pod.train.step import jit_train_step
from tests import trainer
from tests.models.drawn import drawn_state
from tests.tiny_run import tiny_config

EVERY = 7


def layers_of(params):
    """The parameters of each layer of `tiny_config`, which repeats two blocks and a last one."""
    blocks = params["blocks"]
    layers = {
        "layer_0": jax.tree.map(lambda x: x[0], blocks["block_0"]),
        "layer_1": jax.tree.map(lambda x: x[0], blocks["block_1"]),
        "layer_2": params["last_blocks"]["block_0"],
    }
    return layers | {k: x for k, x in params.items() if k not in ("blocks", "last_blocks")}


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))


def test_a_probe_says_what_the_step_after_it_does():
    config = tiny_config(**{
        "train.grad_accumulation": 2, "train.global_batch_size": 4, "model.dropout": 0.1,
        "model.dtype": "float32", "optimizer.clip_norm": 0.0,
    })  # fmt: skip
    mesh, model = one_device(), models.build(config, num_classes=257)
    optimizer = make_optimizer(config, model, mesh)
    abstract = abstract_state(model, optimizer.tx, mesh)
    tokens = np.random.default_rng(0).integers(0, 256, (4, config.data.seq_len + 1), np.int32)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    batch["valid"] = np.ones(batch["tokens"].shape, bool)
    compute = functools.partial(
        probe_step, model=model, optimizer=optimizer, objective=NextByte, config=config
    )
    with on_mesh(mesh):
        state = drawn_state(abstract, model, mesh, step=20)
        before = jax.device_get(state.params)
        found = jax.device_get(jax.jit(compute)(state, batch))
        step = jit_train_step(model, optimizer, NextByte, config, mesh, abstract)
        after, (_, metrics) = jax.device_get(step(state, batch))
    # What the step itself says of its gradients, by module, those of dynamics apart.
    for module, rows in {"embedding": ["embedding"], "blocks": ["layer_0", "layer_1"]}.items():
        for suffix, groups in {"": ("decayed", "undecayed"), ".dynamics": ("dynamics",)}.items():
            parts = [found.get(f"{row}/grad_norm/{g}", 0.0) for row in rows for g in groups]
            expected = metrics.get(f"grad_norm/{module}{suffix}", 0.0)
            np.testing.assert_allclose(norm(parts), expected, rtol=1e-4)
    moved = jax.tree.map(np.subtract, after.params, before)
    for kind, tree in {"update_norm": moved, "param_norm": before}.items():
        for layer, part in layers_of(tree).items():
            of_groups = [x for name, x in found.items() if name.startswith(f"{layer}/{kind}/")]
            np.testing.assert_allclose(norm(of_groups), norm(part), rtol=1e-3, err_msg=layer)


def test_probes_change_nothing_and_a_resumed_run_goes_on_with_them(tmp_path):
    reference, workdir = trainer.uninterrupted(), tmp_path / "run"
    command = trainer.command(workdir, f"train.probe_every_steps={EVERY}")
    trainer.run(["env", "TIME_IS_UP_AT=16", *command], code=78)
    assert list(read_history(str(workdir))) == [0, 7, 14]
    trainer.run(command)
    assert trainer.result(workdir)["params_digest"] == trainer.result(reference)["params_digest"]
    lines = trainer.curves(workdir)
    probes = [line for line in lines if any(name.startswith("probes/") for name in line)]
    others = [line for line in lines if line not in probes]
    assert others == trainer.curves(reference)
    assert [line["step"] for line in probes] == list(range(0, 40, EVERY))
    history = read_history(str(workdir))
    assert list(history) == list(range(0, 40, EVERY))
    assert {"step": 14} | scalars(history[14]) == probes[2]
    assert trainer.metrics(workdir)[-3]["goodput/probe_seconds"] > 0
    tags = trainer.event_accumulators(workdir)["train"].Tags()["tensors"]
    figures = {f"pictures/probes/{name}" for name in probe_plots.figures(history)}
    assert {"pictures/probes/activations", "pictures/probes/responses"} <= figures <= set(tags)


def test_a_damaged_probe_is_left_out(tmp_path, caplog):
    folder = tmp_path / "probes"
    folder.mkdir()
    np.savez_compressed(folder / "00000005.npz", rms=np.float32(2))
    whole = (folder / "00000005.npz").read_bytes()
    (folder / "00000010.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "00000015.npz").write_bytes(b"")
    assert read_history(str(tmp_path)) == {5: {"rms": 2.0}}
    assert "00000010.npz is damaged" in caplog.text
    assert "00000015.npz is damaged" in caplog.text


def test_without_matplotlib_the_run_says_so_before_it_trains(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    config = trainer.config(train__probe_every_steps=EVERY)
    with pytest.raises(UserError, match=r"probe_every_steps is 7.*pip install.*plots"):
        loop.run(config, str(tmp_path / "run"))
    assert "step 1/" not in capsys.readouterr().out
