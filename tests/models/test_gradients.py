"""The gradient of every parameter, of every mixer and model and their options, by central
differences in float64.

The cases come from the registries, so that a new mixer or option is among them. They run in a
process of their own, in which single precision is double precision.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.config import annotations, default
from spectral_pod.layers import attention as attention_mixers
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.ops import attention as attention_ops
from spectral_pod.shapes import PAD
from tests.models.drawn import drawn
from tests.multidevice import fake_devices

LENGTH, CLASSES = 24, 5
STEP = 1e-5
ENTRIES = 24  # of a parameter that are tried
SMALL = {
    "model.dtype": "float32", "model.num_layers": 1, "model.memory_interval": 0,
    "model.hidden_dim": 8, "model.embed_dim": 4, "model.memory.head_dim": 4,
    "model.attention.num_heads": 2, "model.attention.rank": 3, "model.attention.window": 5,
    "model.s5.state_dim": 4, "model.s5.blocks": 2, "model.selective.rank": 2,
    "model.wavelet.num_heads": 2, "model.wavelet.levels": 2,
}  # fmt: skip
# Values of options whose types do not list them.
OTHERS = {
    "model.memory.num_heads": (2,), "model.memory.short_conv": (3,),
    "model.memory.clip": (0.2, 0.0), "model.memory.beta_min": (0.1,),
    "model.hyena.short_conv": (1,),
    "model.spectral.kernel_threshold": (0.01,), "model.spectral.kernel_dropout": (0.2,),
    "model.patch.stride": (1,), "model.patch.kernel": (9,),
    "model.patch.ngrams": ((2, 9),),
    "model.wavelet.name": ("haar",), "model.coarser_scales": ((2, 3),),
}  # fmt: skip
KERNELS = ("toeplitz", "butterfly", "fused")  # for accelerators; `tests/ops` has their gradients
# What an option needs in order to matter.
TIME = {"model.spectral.parametrization": "time"}
WITH = {"model.spectral.kernel_threshold": TIME, "model.spectral.kernel_dropout": TIME}


def values_of(field):
    """The values of a field other than its default."""
    kind = annotations()[field]
    listed = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    listed = (True, False) if kind is bool else listed
    value = default()
    for name in field.split("."):
        value = value[name]
    values = (*listed, *OTHERS.get(field, ()))
    return [other for other in values if other != value and other not in KERNELS]


def cases():
    """Changes of the configuration by case; each changes one option of a mixer or of a model."""
    found = {}
    for name, cls in (MIXERS | CHANNEL_MIXERS).items():
        mixer = {"model.pattern": (name,)} if name in MIXERS else {"model.channel_mixer": name}
        of_models = ["spectral_model"] + ["spectral_gpt"] * cls.can_be_causal
        for model in of_models:
            found[f"{model} {name}"] = mixer | {"model.name": model}
        fields = [f"model.{cls.section}.{option}" for option in cls.options()]
        paths = [field.metadata.get("path") for field in cls._own_fields()]
        fields += [f"model.{path}" for path in paths if path]
        for field in fields:
            for value in values_of(field):
                case = mixer | WITH.get(field, {}) | {"model.name": of_models[-1], field: value}
                found[f"{name} {field} {value}"] = case
    fields = (
        "norm",
        "normalization",
        "pooling",
        "coarser_scales",
        "patch.stride",
        "patch.kernel",
        "patch.ngrams",
        "patch.positions",
    )
    for field in (f"model.{name}" for name in fields):
        for value in values_of(field):
            found[f"spectral_model {field} {value}"] = {field: value}
    return found | {
        "two documents": {"data.documents": 2},
        "both directions": {"model.pattern": ("hyena", "delta"), "model.bidirectional": True},
        "no positions": {"model.name": "spectral_gpt", "model.positions": "none"},
        # Without the consistency loss, whose targets are constants to the gradient.
        "spectral_llm": {"model.name": "spectral_llm"},
    }


QUICK = ("spectral_model spectral", "spectral_gpt hyena", "spectral_gpt gated_delta")


# ---- in a process of double precision


def differences(names):
    """By case and parameter: the largest difference of its gradient, relative to the largest."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # tables are in single precision
    jnp.float32, jnp.complex64 = jnp.float64, jnp.complex128
    attention_mixers.attend = attention_ops.attend = attend
    return {name: of_case(cases()[name]) for name in names}


def attend(q_BNHK, k_BSHK, v_BSHK, mask=None):
    """JAX's own has a softmax in single precision."""
    logits = jnp.einsum("bnhk,bshk->bhns", q_BNHK, k_BSHK) / np.sqrt(q_BNHK.shape[-1])
    if mask is not None:
        logits = jnp.where(mask, logits, -1e30)
    return jnp.einsum("bhns,bshk->bnhk", jax.nn.softmax(logits), v_BSHK)


def of_case(overrides):
    """The same by parameter, for one case."""
    config = default()
    config.update_from_flattened_dict(SMALL | {"data.seq_len": LENGTH} | overrides)
    config.model.dtype = "float64"
    model = models.build(config, num_classes=CLASSES)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 20, (2, LENGTH * config.data.documents)).astype(np.int32)
    if not model.causal:
        tokens[1, -5:] = PAD
    mask = jnp.asarray(tokens != PAD)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, mask)["params"])
    params = jax.tree.map(np.float64, drawn(boxed))

    def loss(params):
        rngs = {"dropout": jax.random.key(1)}
        logits = model.apply({"params": params}, tokens, mask, train=True, rngs=rngs)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=logits.shape))
        return jnp.sum(weights * jnp.sin(logits))

    gradient = jax.jit(jax.grad(loss))(params)
    leaves, tree = jax.tree.flatten(params)
    sizes = [leaf.size for leaf in leaves]
    starts = np.cumsum([0, *sizes])
    chosen = np.concatenate(
        [start + rng.permutation(size)[:ENTRIES] for start, size in zip(starts, sizes)]
    )

    def value(flat):
        parts = jnp.split(flat, starts[1:-1].tolist())
        return loss(tree.unflatten([p.reshape(x.shape) for p, x in zip(parts, leaves)]))

    @jax.jit
    def slopes(flat):
        # The loss is traced once for both sides, and compiled once.
        places, steps = np.tile(chosen, 2), np.repeat([STEP, -STEP], len(chosen))
        above, below = jnp.split(
            jax.lax.map(lambda at: value(flat.at[at[0]].add(at[1])), (places, steps)), 2
        )
        return (above - below) / (2 * STEP)

    flat = np.concatenate([leaf.ravel() for leaf in leaves])
    gradients = [np.asarray(g).ravel() for g in jax.tree.leaves(gradient)]
    errors = np.abs(np.concatenate(gradients)[chosen] - np.asarray(slopes(flat)))
    counts = [min(size, ENTRIES) for size in sizes]
    parts = np.split(errors, np.cumsum(counts)[:-1])
    names = [fake_devices.name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {
        name: float(part.max() / max(np.abs(g).max(), 1e-3))
        for name, part, g in zip(names, parts, gradients)
    }


# ---- under pytest


def process_of(name):
    """The cases that one process tries."""
    if name in QUICK:
        return QUICK
    others = [case for case in cases() if case not in QUICK]
    start = others.index(name) // 8 * 8
    return tuple(others[start : start + 8])


@functools.cache
def compared(names):
    return fake_devices.run(__file__, "differences", names)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in cases()],
)
def test_gradients_are_the_slopes(name):
    for parameter, error in compared(process_of(name))[name].items():
        assert error < 1e-5, parameter


if __name__ == "__main__":
    fake_devices.main(differences)
