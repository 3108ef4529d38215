"""SpectralModel: shapes, masks, and the effects of its options."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.layers.multi_scale import MultiScale
from spectral_pod.layers.spectral import norm_gate, rms_gate
from spectral_pod.models import pattern
from spectral_pod.shapes import PAD


def make(seq_len=128, documents=1, **overrides):
    config = default()
    config.data.documents = documents
    # The recurrent method compiles fastest; both methods agree (tests/ops).
    small = {"dtype": "float32", "num_layers": 2, "hidden_dim": 16, "embed_dim": 8}
    small |= {"memory_interval": 2, "memory.head_dim": 4, "memory.method": "recurrent"}
    config.update_from_flattened_dict({f"model.{k}": v for k, v in (small | overrides).items()})
    model = models.build(config, seq_len=seq_len, num_classes=5)
    tokens = jnp.zeros((1, documents * seq_len), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens != PAD)["params"]
    return model, jax.tree.map(lambda x: getattr(x, "value", x), params, is_leaf=_boxed)


def _boxed(x):
    return hasattr(x, "unbox")


def logits(model, params, rows, length):
    tokens = np.full((len(rows), length), PAD, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return apply(model, params, jnp.asarray(tokens))


@partial(jax.jit, static_argnums=0)
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
    ],
    ids=str,
)
def test_padding_never_changes_a_logit(rows, overrides):
    model, params = make(**overrides)
    tolerance = 3e-2 if overrides.get("dtype") == "bfloat16" else 1e-5
    short, long = (logits(model, params, rows, length) for length in (64, 128))
    assert short.dtype == jnp.float32
    np.testing.assert_allclose(short, long, atol=tolerance)
    alone = jnp.concatenate([logits(model, params, [row], 64) for row in rows])
    np.testing.assert_allclose(short, alone, atol=tolerance)


def test_circular_filters_are_invariant_at_their_own_length(rows):
    model, params = make(**{"spectral.padding": "circular"})
    batch, alone = logits(model, params, rows, 128), logits(model, params, rows[1:2], 128)
    np.testing.assert_allclose(batch[1:2], alone, atol=1e-5)


def test_byte_zero_is_data(rows):
    model, params = make()
    with_zero = np.append(rows[1], [0] * 8)
    one, other = logits(model, params, [rows[1], with_zero], 64)
    assert np.abs(one - other).max() > 1e-4


def test_an_empty_record_has_finite_logits_and_gradients():
    model, params = make()
    tokens = jnp.full((1, 64), PAD, jnp.int32)

    def loss(params):
        return jnp.sum(jnp.square(apply(model, params, tokens)))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_every_parameter_gets_a_gradient(rows):
    model, params = make()
    tokens = np.full((4, 128), PAD, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row

    def loss(params):
        out = apply(model, params, jnp.asarray(tokens))
        return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    grads = jax.jit(jax.grad(loss))(params)
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(g).max() > 0
    ]
    assert dead == []


def test_rematerialization_and_scan_change_no_number(rows):
    plain, params = make(num_layers=4)
    want = logits(plain, params, rows, 64)
    for remat in ("full", "dots"):
        model, same = make(num_layers=4, remat=remat)
        assert jax.tree.structure(same) == jax.tree.structure(params)
        np.testing.assert_allclose(logits(model, params, rows, 64), want, atol=1e-6)


def test_dropout_is_drawn_only_in_training(rows):
    model, params = make(dropout=0.5)
    tokens = jnp.asarray(np.stack([rows[3]] * 2), jnp.int32)

    @jax.jit
    def train_logits(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, tokens, tokens != PAD, train=True, rngs=rngs)

    one, other = train_logits(jax.random.key(1)), train_logits(jax.random.key(2))
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one[0] - one[1]).max() > 1e-3  # each row has its own mask
    np.testing.assert_array_equal(one, train_logits(jax.random.key(1)))


def test_the_original_energy_gate_does_nothing_and_the_default_does():
    """For u of unit variance and D = 256, sigmoid(|u|) is 1; the rms gate is 1/2 and can learn."""
    u_BND = jax.random.normal(jax.random.key(0), (1, 64, 256))
    assert norm_gate(u_BND).min() > 0.999999
    ones, zeros = jnp.ones(256), jnp.zeros(256)
    np.testing.assert_allclose(rms_gate(u_BND, ones, zeros), 0.5, atol=0.05)
    assert rms_gate(4 * u_BND, 4 * ones, zeros).min() > rms_gate(u_BND, ones, zeros).max()


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


def test_coarser_scales_see_further():
    """Without mixers a patch depends on its bytes only, and with scales on its coarse patch."""
    rng = np.random.default_rng(0)
    x_BND = jnp.asarray(rng.normal(size=(2, 13, 8)), jnp.float32)
    module = MultiScale((2, 3), jnp.float32)
    mask_BN = jnp.ones((2, 13), bool)
    params = module.init(jax.random.key(0), x_BND, mask_BN)
    changed_BND = module.apply(params, x_BND.at[:, 7].add(1.0), mask_BN)
    moved_N = jnp.abs(changed_BND - module.apply(params, x_BND, mask_BN)).max((0, 2)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved_N), np.arange(6, 12))


def test_the_documents_of_a_pair_are_encoded_by_themselves(rows):
    """The encoding of the first document depends neither on its padding nor on the second one."""
    model, params = make(documents=2)
    a, b, c, d = rows

    def pairs(*pairs_, length=64):
        tokens = np.full((len(pairs_), 2, length), PAD, np.int32)
        for i, pair in enumerate(pairs_):
            for j, document in enumerate(pair):
                tokens[i, j, : len(document)] = document
        return apply(model, params, jnp.asarray(tokens.reshape(len(pairs_), -1)))

    both = pairs((a, b), (c, d))
    np.testing.assert_allclose(both[0], pairs((a, b), (d, b))[0], atol=1e-6)
    np.testing.assert_allclose(both, pairs((a, b), (c, d), length=128), atol=1e-5)
    assert np.abs(both[0] - pairs((b, a))[0]).max() > 1e-3
    _, encode = make()  # a model of one document, which differs in the head only
    same = {name: params[name] for name in encode if name != "head"}
    assert jax.tree.map(jnp.shape, same) == jax.tree.map(
        jnp.shape, {name: encode[name] for name in same}
    )
