"""BatchNorm: against float64, its running averages in training, and what padding does to it."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.generate.restore import one_device
from spectral_pod.layers.dense import BatchNorm
from spectral_pod.objectives import Classification
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.shapes import PAD
from spectral_pod.train.optim import evaluated, guard_state, make_optimizer
from spectral_pod.train.state import init_state
from spectral_pod.train.step import forward, train_step


def test_valid_positions_are_normalised():
    rng = np.random.default_rng(0)
    x_BND, lengths = 3 + 2 * rng.normal(size=(4, 9, 5)), np.array([9, 4, 1, 0])
    mask_BN = np.arange(9) < lengths[:, None]
    module = BatchNorm(deterministic=False)
    inputs = jnp.asarray(x_BND, jnp.float32), jnp.asarray(mask_BN)
    variables = nn.unbox(module.init(jax.random.key(0), *inputs))
    y_BND, sown = module.apply({"params": variables["params"]}, *inputs, mutable=["statistics"])
    valid = x_BND[mask_BN]
    want = (valid - valid.mean(axis=0)) / np.sqrt(valid.var(axis=0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y_BND)[mask_BN], want, atol=1e-5)
    running = jax.tree.map(np.asarray, sown["statistics"])
    np.testing.assert_allclose(running["mean"], 0.05 * valid.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(running["variance"], 0.95 + 0.05 * valid.var(axis=0), rtol=1e-5)
    fixed = BatchNorm(deterministic=True)
    used = {"params": variables["params"] | dict(running)}
    want = (x_BND - running["mean"]) / np.sqrt(running["variance"] + 1e-5)
    np.testing.assert_allclose(fixed.apply(used, inputs[0]), want, rtol=1e-4, atol=1e-5)


@functools.cache
def trained(accumulation=1, on_bad_step="stop", average=0.0):
    """(the states after each of a few steps, the last batch, forward of the model)."""
    config = default()
    small = {
        "dtype": "float32", "num_layers": 2, "hidden_dim": 8, "embed_dim": 4, "memory_interval": 0,
        "normalization": "batch", "spectral.method": "real", "channel_mixer": "half_glu1",
    }  # fmt: skip
    config.update_from_flattened_dict({f"model.{k}": v for k, v in small.items()})
    config.data.seq_len, config.train.grad_accumulation = 32, accumulation
    config.train.on_bad_step, config.optimizer.average = on_bad_step, average
    config.optimizer.warmup_steps = 1
    model, mesh, states = models.build(config, num_classes=3), one_device(), []
    optimizer = make_optimizer(config, model, mesh)
    state = init_state(model, optimizer.tx, mesh, seed=0)
    fixed = {"model": model, "optimizer": optimizer, "objective": Classification, "config": config}
    step = jax.jit(functools.partial(train_step, **fixed))
    with on_mesh(mesh):
        for seed in range(3):
            states.append(state)
            state, _ = step(state, batch_of(seed))
    return [*states, state], functools.partial(forward, model=model, objective=Classification)


def batch_of(seed, rows=8):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (rows, 32)).astype(np.int32)
    tokens[0, 20:] = PAD
    labels = jnp.asarray(rng.integers(0, 3, rows), jnp.int32)
    return {"tokens": jnp.asarray(tokens), "labels": labels, "valid": jnp.ones(rows, bool)}


def statistics(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves
            if path[-1].key in ("mean", "variance")}  # fmt: skip


def test_training_keeps_running_averages_of_every_layer():
    """Each step replaces them by what its forward pass has sown, and nothing else moves them."""
    states, run = trained()
    for seed, (before, after) in enumerate(itertools.pairwise(states)):
        _, _, sown = run(before.params, batch_of(seed), train=True, key=jax.random.key(0))
        expected, found = statistics(sown["statistics"]), statistics(after.params)
        assert len(found) == 2  # of the layers together: mean and variance
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)
            assert np.abs(value - statistics(before.params)[name]).min() > 0


def test_evaluations_depend_on_no_other_record():
    states, run = trained()
    batch = batch_of(9)
    _, logits, _ = run(states[-1].params, batch)
    _, alone, _ = run(states[-1].params, {name: x[:1] for name, x in batch.items()})
    np.testing.assert_allclose(logits[:1], alone, atol=1e-5)


@pytest.mark.parametrize("options", [{"accumulation": 2}, {"on_bad_step": "skip", "average": 0.9}])
def test_with_what_else_a_step_does(options):
    states, _ = trained(**options)
    found, first = statistics(evaluated(states[-1])), statistics(states[0].params)
    assert all(np.isfinite(x).all() and (x != first[name]).all() for name, x in found.items())
    guard = guard_state(states[-1].opt_state)
    assert (guard is None) == ("on_bad_step" not in options)
