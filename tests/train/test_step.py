"""The training step: what its losses are divided by."""

import jax
import numpy as np

from spectral_pod import models
from spectral_pod.generate.restore import one_device
from spectral_pod.objectives import NextByte
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.shapes import PAD
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state
from spectral_pod.train.step import jit_train_step
from tests.models.drawn import drawn_state
from tests.tiny_run import tiny_config

LENGTH = 32


def test_rows_of_padding_change_nothing():
    config = tiny_config(**{
        "data.seq_len": LENGTH, "model.name": "spectral_llm", "model.num_layers": 1,
        "model.dtype": "float32", "model.memory_interval": 0, "model.consistency_weight": 0.5,
        "model.pattern": ("linear_attention",),
        "train.grad_accumulation": 2,
    })  # fmt: skip
    objective, mesh = NextByte, one_device()
    model = models.build(config, num_classes=257)
    optimizer = make_optimizer(config, model, mesh)
    abstract = abstract_state(model, optimizer.tx, mesh)
    tokens = np.random.default_rng(0).integers(0, 256, (4, LENGTH + 1), np.int32)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "valid": np.ones((4, LENGTH), bool)}
    empty = {"tokens": PAD, "labels": 0, "valid": False}

    def step(batch):
        with on_mesh(mesh):
            run = jit_train_step(model, optimizer, objective, config, mesh, abstract)
            state, (averages, scalars) = run(drawn_state(abstract, model, mesh), batch)
        return state.params, jax.tree.leaves(averages), scalars

    padded = {k: np.concatenate([x, np.full_like(x, empty[k])]) for k, x in batch.items()}
    results, expected = step(padded), step(batch)
    assert expected[2]["auxiliary_loss"] > 0.1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results, expected
    )
