"""Optimizers: the group of every parameter, what decays, and every optimizer by its name."""

import functools

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
from spectral_pod.models.model import abstract_params, init_params
from spectral_pod.train import optim
from spectral_pod.train.optim import OPTIMIZERS, make_optimizer

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
    "bias", "scale", "query", "short_filter", "skip", "level_weight", "mix", "amplitude",
    "frequency", "phase",
}  # fmt: skip


def config_of(**fields):
    config = default()
    small = {
        "data.seq_len": 64, "model.dtype": "float32", "model.num_layers": 2,
        "model.hidden_dim": 16, "model.embed_dim": 8, "model.memory.head_dim": 4,
        "model.attention.num_heads": 2, "model.wavelet.num_heads": 2, "model.s5.state_dim": 4,
        "train.total_steps": 20, "optimizer.warmup_steps": 1,
    }  # fmt: skip
    config.update_from_flattened_dict(small | fields)
    return config


def model_of(config):
    return models.build(config, seq_len=64, num_classes=10)


@functools.cache
def found():
    """The groups of all parameters of all models and mixers, by the last part of their names."""
    every = []
    for name, cls in models.MODELS.items():
        pattern = tuple(m for m in MIXERS if MIXERS[m].can_be_causal or not cls.causal)
        blocks = {"model.name": name, "model.pattern": pattern, "model.num_layers": len(pattern)}
        others = {
            "model.hyena.filter": "implicit", "model.memory.short_conv": 3,
            "model.channel_mixer": "frequency", "model.spectral.parametrization": "time",
            "data.documents": cls.max_documents,
        }  # fmt: skip
        every += [config_of(**blocks), config_of(**blocks, **others)]
    by_name = {}
    for config in every:
        tree = groups(abstract_params(model_of(config), one_device()))
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
    optimizer = make_optimizer(config, model, one_device())
    params = nn.unbox(jax.jit(functools.partial(init_params, model))(jax.random.key(0)))

    @jax.jit
    def run(params):
        with jax.numpy_dtype_promotion("standard"):
            state = optimizer.tx.init(params)
            grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), params)
            for _ in range(2):  # the first has a learning rate of zero
                updates, state = optimizer.tx.update(grads, state, params)
        return updates

    return params, run(params), optimizer.groups


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_only_what_is_declared_so_decays_and_dynamics_have_their_own_rate(name):
    fields = {"optimizer.name": name, "optimizer.learning_rate": 1e-2}
    params, with_decay, group_of = stepped(**fields, **{"optimizer.weight_decay": 0.5})
    _, without, _ = stepped(**fields, **{"optimizer.weight_decay": 0.0})
    _, slower, _ = stepped(
        **fields, **{"optimizer.weight_decay": 0.0, "optimizer.dynamics_learning_rate": 5e-4}
    )
    rate = 1e-2  # at the second step, the end of the warm-up

    def check(group, p, u, u_plain, u_slow):
        decay = -rate * 0.5 * np.asarray(p) if group == "decayed" else 0
        np.testing.assert_allclose(u - u_plain, decay, rtol=1e-3, atol=1e-7)
        factor = 0.5 if group == "dynamics" else 1
        np.testing.assert_allclose(u_slow, factor * np.asarray(u_plain), rtol=1e-5)
        assert np.isfinite(u).all()

    jax.tree.map(check, group_of, params, with_decay, without, slower)
    assert all(np.abs(u).max() > 0 for u in jax.tree.leaves(without))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_descends(name):
    """On a quadratic function with its minimum elsewhere."""
    config = config_of(**{"optimizer.name": name, "optimizer.weight_decay": 0.0,
                          "optimizer.learning_rate": 3e-2, "train.total_steps": 200,
                          "optimizer.dynamics_learning_rate": 3e-2})  # fmt: skip
    model = model_of(config)
    optimizer = make_optimizer(config, model, one_device())
    init = jax.jit(lambda key: nn.unbox(init_params(model, key)))
    params, goal = init(jax.random.key(0)), init(jax.random.key(1))

    def loss(params):
        return sum(
            jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (params, goal)))
        )

    @jax.jit
    def step(params, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = float(loss(params)), optimizer.tx.init(params)
    for _ in range(60):
        params, state = step(params, state)
    assert float(loss(params)) < 0.7 * before


def test_an_optimizer_is_added_by_one_line(monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "sign", lambda options, boxed: optax.scale_by_sign())
    _, updates, group_of = stepped(**{"optimizer.name": "sign", "optimizer.weight_decay": 0.0})
    for group, update in zip(jax.tree.leaves(group_of), jax.tree.leaves(updates)):
        assert group in ("dynamics", "decayed", "undecayed")
        np.testing.assert_allclose(update, -1e-3, rtol=1e-6)
