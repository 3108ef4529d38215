"""SpectralModel: shapes, masks, and the effects of its options."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.generate.restore import one_device
from spectral_pod.layers.feed_forward import HalfGLU, HalfGLU2
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.multi_scale import MultiScale
from spectral_pod.layers.pooling import Comparison
from spectral_pod.layers.spectral import norm_gate, rms_gate
from spectral_pod.models import pattern
from spectral_pod.models.model import abstract_params
from spectral_pod.shapes import PAD
from tests.models.drawn import drawn_params, initial_params


@functools.cache
def make(documents=1, **overrides):
    """(a model, parameters), with one block in two layers unless the overrides say otherwise."""
    config = default()
    config.data.documents = documents
    # The recurrent method compiles fastest; both methods agree (tests/ops).
    small = {"dtype": "float32", "num_layers": 2, "hidden_dim": 16, "embed_dim": 8}
    small |= {"memory_interval": 1, "memory.head_dim": 4, "memory.method": "recurrent"}
    config.update_from_flattened_dict({f"model.{k}": v for k, v in (small | overrides).items()})
    model = models.build(config, seq_len=128, num_classes=5)
    return model, drawn_params(model)


def padded(rows, length):
    tokens = np.full((len(rows), length), PAD, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


def logits(model, params, rows, length):
    return apply(model, params, padded(rows, length))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens):
    return model.apply({"params": params}, tokens, tokens != PAD)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n) for n in (1, 30, 63, 64)]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"norm": "post", "pooling": "mean", "memory.normalize_keys": False},
        {"spectral.parametrization": "time", "pooling": "last", "spectral.energy_gate": "norm"},
        {"dtype": "bfloat16"},
        {"coarser_scales": (4, 3)},
        {"pattern": ("spectral+local_attention", "spectral"), "attention.window": 8},
        {"memory.num_heads": 2, "memory.method": "chunked", "memory.gated": True, "remat": "full"},
        {"patch.stride": 1, "patch.positions": "none", "channel_mixer": "half_glu1"},
        {"patch.stride": 2, "patch.kernel": 7, "channel_mixer": "half_glu2", "norm": "post"},
        {"bidirectional": True, "pattern": ("hyena", "wavelet+delta"), "memory.short_conv": 3},
        {"pattern": ("selective",), "selective.energy_gate": "rms"},
        {"patch.ngrams": (2, 5), "patch.ngram_rows": 100},
    ],
    ids=str,
)
def test_padding_never_changes_a_logit(rows, overrides):
    """Neither positions after a record nor other records do, which may be empty."""
    model, params = make(**overrides)
    tolerance = 3e-2 if overrides.get("dtype") == "bfloat16" else 1e-5
    short, long = (logits(model, params, rows, length) for length in (64, 128))
    assert short.dtype == jnp.float32
    np.testing.assert_allclose(short, long, atol=tolerance)
    for i, row in enumerate(rows):
        alone = logits(model, params, [[]] * i + [row] + [[]] * (len(rows) - i - 1), 64)
        np.testing.assert_allclose(short[i], alone[i], atol=tolerance)


def test_circular_filters_are_invariant_at_their_own_length(rows):
    model, params = make(**{"spectral.padding": "circular"})
    batch = logits(model, params, rows, 128)
    alone = logits(model, params, [[], rows[1], [], []], 128)
    np.testing.assert_allclose(batch[1], alone[1], atol=1e-5)


def test_byte_zero_is_data(rows):
    model, params = make()
    with_zero = np.append(rows[1], [0] * 8)
    one, other, *_ = logits(model, params, [rows[1], with_zero, [], []], 64)
    assert np.abs(one - other).max() > 1e-4


def test_initial_gradients_reach_every_parameter_and_are_finite_for_empty_records(rows):
    model, _ = make()
    params = initial_params(model)

    @jax.jit
    def value_and_gradients(tokens):
        def loss(params):
            out = apply(model, params, tokens)
            return jnp.sum(out * jnp.sin(jnp.arange(float(out.size))).reshape(out.shape))

        return jax.value_and_grad(loss)(params)

    _, grads = value_and_gradients(padded(rows, 128))
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(g).max() > 0
    ]
    assert dead == []
    of_nothing = value_and_gradients(padded([[]] * 4, 128))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(of_nothing))


def test_rematerialization_and_scan_change_no_number(rows):
    plain, params = make()
    want = logits(plain, params, rows, 64)
    for remat in ("full", "dots"):
        model, same = make(remat=remat)
        assert jax.tree.structure(same) == jax.tree.structure(params)
        np.testing.assert_allclose(logits(model, params, rows, 64), want, atol=1e-6)


def test_dropout_is_drawn_only_in_training(rows):
    model, params = make(dropout=0.5)
    tokens = padded([rows[3]] * 2, 64)

    @jax.jit
    def train_logits(params, tokens, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, tokens, tokens != PAD, train=True, rngs=rngs)

    one, other, same = (np.asarray(train_logits(params, tokens, seed)) for seed in (1, 2, 1))
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one[0] - one[1]).max() > 1e-3  # each row has its own mask
    np.testing.assert_array_equal(one, same)


def test_the_original_energy_gate_does_nothing_and_the_default_does():
    """For u of unit variance and D = 256, sigmoid(|u|) is 1; the rms gate is 1/2 and can learn."""
    u_BND = np.random.default_rng(0).normal(size=(1, 64, 256)).astype(np.float32)
    assert jax.jit(norm_gate)(u_BND).min() > 0.999999
    ones, zeros, gate = np.ones(256, np.float32), np.zeros(256, np.float32), jax.jit(rms_gate)
    np.testing.assert_allclose(gate(u_BND, ones, zeros), 0.5, atol=0.05)
    assert gate(4 * u_BND, 4 * ones, zeros).min() > gate(u_BND, ones, zeros).max()


def test_memory_stands_where_the_interval_says():
    config = default()
    for interval, gated, blocks in (
        (2, False, ("spectral", "spectral+delta")),
        (0, False, ("spectral",)),
        (1, True, ("spectral+gated_delta",)),
    ):
        config.model.memory_interval, config.model.memory.gated = interval, gated
        assert pattern(config) == blocks
    config.model.pattern = ("delta", "spectral")
    assert pattern(config) == ("delta", "spectral")
    _, params = make(memory_interval=2, num_layers=3)
    assert "delta" in params["blocks"]["block_1"]
    assert "delta" not in params["last_blocks"]["block_0"]


@pytest.mark.parametrize("name", sorted(name for name, m in MIXERS.items() if m.one_directional))
def test_bidirectional_mixers_treat_both_directions_alike(rows, name):
    """Exchanging the parameters of the two directions reverses the model in time."""
    overrides = {"pattern": (name,), "num_layers": 1, "patch.stride": 1, "patch.kernel": 1}
    overrides |= {"patch.positions": "none", "pooling": "mean"}
    model, params = make(bidirectional=True, **overrides)
    block = params["blocks"]["block_0"]
    exchanged = block | {name: block[f"{name}_reverse"], f"{name}_reverse": block[name]}
    want = logits(model, params, rows, 64)
    got = logits(
        model, params | {"blocks": {"block_0": exchanged}}, [row[::-1] for row in rows], 64
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - logits(model, params, [row[::-1] for row in rows], 64)).max() > 1e-3


def test_half_glus_are_those_of_s5():
    y_BND = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    for cls in (HalfGLU, HalfGLU2):
        module = cls(width=4)
        params = nn.unbox(module.init(jax.random.key(0), y_BND))
        dense = jax.tree.map(np.asarray, params["params"]["gate"])
        activated = np.asarray(jax.nn.gelu(y_BND))
        gate = special.expit(activated @ dense["kernel"] + dense["bias"])
        want = gate * (activated if cls is HalfGLU else y_BND)
        np.testing.assert_allclose(module.apply(params, y_BND), want, atol=1e-5)


def test_coarser_scales_see_further():
    """Without mixers a patch depends on its bytes only; what scales add, on its coarse patch."""
    rng = np.random.default_rng(0)
    x_BND = np.float32(rng.normal(size=(2, 13, 8)))
    other_BND = x_BND + np.float32(np.arange(13) == 7)[:, None]
    module, mask_BN = MultiScale((2, 3), jnp.float32), np.ones((2, 13), bool)
    params = jax.jit(module.init)(jax.random.key(0), x_BND, mask_BN)
    one_BND, changed_BND = (jax.jit(module.apply)(params, x, mask_BN) for x in (x_BND, other_BND))
    moved_N = np.abs(changed_BND - one_BND).max((0, 2)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved_N), np.arange(6, 12))


def test_the_documents_of_a_pair_are_encoded_by_themselves(rows):
    """The encoding of the first document depends neither on its padding nor on the second one."""
    model, params = make(documents=2)
    a, b, c, d = rows

    def pairs(*pairs_, length=64):
        return apply(model, params, np.stack([padded(p, length).ravel() for p in pairs_]))

    some = pairs((a, b), (c, d), (b, a))
    np.testing.assert_allclose(some[0], pairs((a, b), (d, b), (b, a))[0], atol=1e-6)
    np.testing.assert_allclose(some, pairs((a, b), (c, d), (b, a), length=128), atol=1e-5)
    assert np.abs(some[0] - some[2]).max() > 1e-3
    _, encode = make()  # a model of one document, which differs in the head only
    same = {name: params[name] for name in encode if name != "head"}
    assert jax.tree.map(jnp.shape, same) == jax.tree.map(
        jnp.shape, {name: encode[name] for name in same}
    )


def test_a_normalized_comparison_removes_what_documents_share():
    rng = np.random.default_rng(0)
    pooled_BD = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    module = Comparison(jnp.float32, normalized=True, deterministic=False)
    is_document_B = jnp.arange(8) < 6
    pooled_BD = jnp.concatenate([pooled_BD, jnp.full((2, 4), 100.0)])  # and a row of padding
    params = nn.unbox(module.init(jax.random.key(0), pooled_BD, is_document_B)["params"])

    def compared(x_BD):
        variables = {"params": params}
        y_BD, sown = module.apply(variables, x_BD, is_document_B, mutable=["statistics"])
        return y_BD[:3], sown["statistics"]["norm"]

    found_BD, after = compared(pooled_BD)
    z_BD = np.float64(pooled_BD[:6])
    z_BD = (z_BD - z_BD.mean(0)) / np.sqrt(z_BD.var(0) + 1e-5)
    a_BD, b_BD = z_BD[0::2], z_BD[1::2]
    hidden = params["hidden"]
    parts = a_BD, b_BD, a_BD * b_BD, np.abs(a_BD - b_BD)
    u_BD = np.concatenate(parts, 1) @ np.float64(hidden["kernel"])
    u_BD += np.float64(hidden["bias"])
    gelu_BD = 0.5 * u_BD * (1 + np.tanh(np.sqrt(2 / np.pi) * (u_BD + 0.044715 * u_BD**3)))
    np.testing.assert_allclose(found_BD, gelu_BD, atol=1e-5)
    np.testing.assert_allclose(compared(pooled_BD + 3.0)[0], found_BD, atol=1e-5)
    np.testing.assert_allclose(after["mean"], 0.05 * pooled_BD[:6].mean(0), atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, tokens):
    def loss(params):
        return jnp.sum(model.apply({"params": params}, tokens, tokens != PAD) ** 2)

    return jax.grad(loss)(params)


def test_attention_in_a_scan_over_layers_holds_no_array_of_all_pairs():
    """There JAX may compute what depends on the mask alone for all blocks beforehand."""
    config, held = default(), []
    changes = {"num_layers": 2, "hidden_dim": 16, "embed_dim": 8, "patch.stride": 1}
    changes |= {"dtype": "float32", "pattern": ("attention",), "memory_interval": 0}
    config.update_from_flattened_dict({f"model.{k}": v for k, v in changes.items()})
    for length in (2048, 4096):
        model = models.build(config, seq_len=length, num_classes=5)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        params = nn.unbox(abstract_params(model, one_device()))
        compiled = gradient.lower(model, params, tokens).compile()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
    assert held[1] < 2.2 * held[0]
