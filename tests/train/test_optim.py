"""Optimizers: the group of every parameter, what decays, and every optimizer by its name."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.generate.restore import one_device
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.parameter import groups
from spectral_pod.models.model import abstract_params
from spectral_pod.train import optim
from spectral_pod.train.optim import OPTIMIZERS, make_optimizer
from tests.models.drawn import drawn_params

# The group of every parameter that a model can have, by its name.
DYNAMICS = {
    "filter", "filter_0", "filter_1", "filter_out", "log_decay", "energy_slope", "energy_bias",
    "scale_memory", "ssm_lambda", "ssm_b", "ssm_log_step",
}  # fmt: skip
DECAYED = {
    "kernel", "embedding", "position_embedding", "readout", "readout_reverse", "key_combinations",
    "value_combinations",
}  # fmt: skip
UNDECAYED = {
    "bias", "query_value_bias", "scale", "query", "short_filter", "skip", "level_weight", "mix",
    "amplitude", "frequency", "phase",
}  # fmt: skip


def config_of(**fields):
    config = default()
    small = {
        "data.seq_len": 64, "model.dtype": "float32", "model.num_layers": 2,
        "model.hidden_dim": 16, "model.embed_dim": 8, "model.memory.head_dim": 4,
        "model.attention.num_heads": 2, "model.wavelet.num_heads": 2, "model.s5.state_dim": 4,
        "model.s5.blocks": 2,
        "train.total_steps": 20, "optimizer.warmup_steps": 1,
    }  # fmt: skip
    config.update_from_flattened_dict(small | fields)
    return config


def model_of(config):
    return models.build(config, num_classes=10)


def found():
    """The groups of all parameters of all models and mixers, by the last part of their names."""
    # Only shapes are computed, in the methods that trace fastest.
    fast = {"data.seq_len": 16, "model.memory.method": "recurrent", "model.long_conv": "real",
            "model.spectral.method": "real"}  # fmt: skip
    others = {
        "model.hyena.filter": "implicit", "model.memory.short_conv": 3,
        "model.channel_mixer": "frequency", "model.spectral.parametrization": "time",
    }  # fmt: skip
    by_name = {}
    for name, cls in models.MODELS.items():
        mixers = tuple(m for m in MIXERS if MIXERS[m].can_be_causal or not cls.causal)
        # A repeat that is not whole is traced once, and one that is scanned three times.
        blocks = {"model.name": name, "model.num_layers": len(mixers)}
        blocks["model.pattern"] = (*mixers, mixers[0])
        for fields in ({}, others | {"data.documents": cls.max_documents}):
            model = model_of(config_of(**fast, **blocks, **fields))
            tree = groups(abstract_params(model, one_device()))
            for path, group in jax.tree_util.tree_leaves_with_path(tree):
                by_name.setdefault(path[-1].key, set()).add(group)
    return by_name


def test_the_group_of_every_parameter():
    expected = {name: {"dynamics"} for name in DYNAMICS}
    expected |= {name: {"decayed"} for name in DECAYED}
    expected |= {name: {"undecayed"} for name in UNDECAYED}
    # The convolution over bytes has a kernel with a bias as a Dense layer has.
    assert found() == expected


def test_a_parameter_without_a_group_is_an_error():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("gain", nn.initializers.ones_init(), ())

    boxed = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    with pytest.raises(ValueError, match="parameter bias declares no optimizer group"):
        groups(boxed)
    with pytest.raises(ValueError, match="parameter gain declares no optimizer group"):
        groups(Plain().init(jax.random.key(0), jnp.ones(2))["params"])


def stepped(**fields):
    """(parameters, updates of one step from equal gradients, groups) of an optimizer."""
    config = config_of(**fields)
    model = model_of(config)
    optimizer, params = make_optimizer(config, model, one_device()), drawn_params(model)
    grads = jax.tree.map(lambda x: np.full_like(x, 1e-3), params)
    state = jax.jit(optimizer.tx.init)(params)
    update = jax.jit(updated, static_argnums=0)
    _, state = update(optimizer.tx, grads, state, params)  # with a learning rate of zero
    updates, _ = update(optimizer.tx, grads, state, params)
    return params, jax.device_get(updates), optimizer.groups


def updated(tx, grads, state, params):
    with jax.numpy_dtype_promotion("standard"):
        return tx.update(grads, state, params)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_only_what_is_declared_so_decays_and_dynamics_have_their_own_rate(name):
    """Two runs differ in the decay and in the rate of dynamics only."""
    rate = 1e-2  # at the second step, the end of the warm-up
    fields = {"optimizer.name": name, "optimizer.learning_rate": rate}
    params, updates, group_of = stepped(
        **fields, **{"optimizer.weight_decay": 0.5, "optimizer.dynamics_learning_rate": 1e-3}
    )
    _, others, _ = stepped(
        **fields, **{"optimizer.weight_decay": 0.0, "optimizer.dynamics_learning_rate": 5e-4}
    )

    def check(group, p, u, other):
        assert np.isfinite(u).all()
        assert np.abs(other).max() > 0
        if group == "decayed":
            np.testing.assert_allclose(u - other, -rate * 0.5 * p, rtol=1e-3, atol=1e-7)
        else:
            factor = 0.5 if group == "dynamics" else 1
            np.testing.assert_allclose(other, factor * u, rtol=1e-5)

    jax.tree.map(check, group_of, params, updates, others)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_descends(name):
    """On a quadratic function with its minimum elsewhere."""
    config = config_of(**{"optimizer.name": name, "optimizer.weight_decay": 0.0,
                          "optimizer.learning_rate": 3e-2, "train.total_steps": 200,
                          "optimizer.dynamics_learning_rate": 3e-2})  # fmt: skip
    model = model_of(config)
    tx = make_optimizer(config, model, one_device()).tx
    params, goal = drawn_params(model, 0), drawn_params(model, 1)

    def loss(params):
        return sum(
            jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (params, goal)))
        )

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = updated(tx, grads, state, params)
        return value, optax.apply_updates(params, updates), state

    values, state = [], jax.jit(tx.init)(params)
    for _ in range(61):
        value, params, state = step(params, state)
        values.append(value)
    assert values[60] < 0.7 * values[0]


def test_an_optimizer_is_added_by_one_line(monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "sign", lambda options, boxed: optax.scale_by_sign())
    _, updates, group_of = stepped(**{"optimizer.name": "sign", "optimizer.weight_decay": 0.0})
    for group, update in zip(jax.tree.leaves(group_of), jax.tree.leaves(updates)):
        assert group in ("dynamics", "decayed", "undecayed")
        np.testing.assert_allclose(update, -1e-3, rtol=1e-6)


def test_the_average_of_parameters():
    """Against the definition in float64; after a bad step the same parameters count again."""
    config = config_of(**{
        "optimizer.average": 0.9, "train.on_bad_step": "skip", "model.memory_interval": 0
    })  # fmt: skip
    model = model_of(config)
    tx = make_optimizer(config, model, one_device()).tx
    params = drawn_params(model)
    state, step = tx.init(params), jax.jit(tx.update)
    average = jax.tree.map(np.float64, params)
    for t, loss in enumerate((1.0, 1.0, np.nan, 1.0)):
        gradients = jax.tree.map(lambda x, t=t: jnp.sin(x + t), params)
        with jax.numpy_dtype_promotion("standard"):  # as in a training step
            updates, state = step(gradients, state, params, loss=jnp.float32(loss))
        params = optax.apply_updates(params, updates)
        decay = min(0.9, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.average, average)
    assert optim.guard_state(state).bad == 0
    held = types.SimpleNamespace(opt_state=state, params=params)
    assert optim.evaluated(held) is state.average
    held.opt_state = state.inner
    assert optim.evaluated(held) is params
