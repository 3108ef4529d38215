"""Writes a workdir as a run does, but without training: its parameters are drawn."""

import jax
import numpy as np

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.data import tasks
from spectral_pod.generate.restore import one_device
from spectral_pod.train import starts
from spectral_pod.train.checkpoint import Checkpointer
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state
from tests.models.drawn import drawn_state

DIGEST = "0123456789abcdef" * 4


def tiny_config(**overrides):
    """A small configuration; its third layer is beyond the last whole repeat of the pattern."""
    config = default()
    small = {
        "data.task": "lm", "data.seq_len": 96, "model.name": "spectral_gpt",
        "model.num_layers": 3, "model.hidden_dim": 16, "model.embed_dim": 8,
        "model.memory.num_heads": 2, "model.memory.head_dim": 4, "model.wavelet.num_heads": 2,
        "model.wavelet.levels": 2, "train.compilation_cache": False,
    }  # fmt: skip
    config.update_from_flattened_dict(small | overrides)
    return config


def write_run(workdir, config=None, *, mesh=None, steps=(1,), num_classes=None):
    """Writes a workdir; returns the parameters of its last step, stacked as in training."""
    config, mesh = config or tiny_config(), mesh or one_device()
    task = tasks.make(config.data.task, config.data.options)
    run = starts.claim_workdir(str(workdir), config, DIGEST)
    model = models.build(
        config,
        seq_len=config.data.seq_len,
        num_classes=num_classes or task.num_classes,
        vocab_size=task.vocab_size,
    )
    abstract = abstract_state(model, make_optimizer(config, model, mesh).tx, mesh)
    with (
        Checkpointer(
            f"{workdir}/checkpoints", keep_latest=len(steps), keep_best=0, run=run
        ) as checkpointer,
        jax.set_mesh(mesh),
    ):
        for step in steps:
            state = drawn_state(abstract, model, mesh, step)
            checkpointer.save(step, state, None)
    return state.params


def parameters(workdir, config, step):
    """The final parameters, at `step`, of a run with ten classes, by name, on one device."""
    model = models.build(config, seq_len=config.data.seq_len, num_classes=10)
    tx = make_optimizer(config, model, one_device()).tx
    abstract = abstract_state(model, tx, one_device())
    with Checkpointer(str(workdir / "checkpoints"), keep_latest=1, keep_best=0) as checkpointer:
        state = checkpointer.restore(abstract)
    assert int(state.step) == step
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(state.params)
    }
