"""SpectralLLM as a whole: causality, padding, its consistency loss, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.generate.decode import Decoder
from spectral_pod.layers.block import unstack
from spectral_pod.ops.log_spectra import FLOOR, log_spectral_distance
from spectral_pod.shapes import PAD
from tests.models.drawn import drawn_params, initial_params


@functools.cache
def make(*, decoding=False, **overrides):
    config = default()
    small = {
        "name": "spectral_llm",
        "dtype": "float32",
        "num_layers": 1,
        "hidden_dim": 16,
        "memory_interval": 0,
        "channel_mixer": "frequency",
        "consistency_weight": 0.1,
        "wavelet.num_heads": 2,
    }
    config.update_from_flattened_dict({f"model.{k}": v for k, v in (small | overrides).items()})
    build = functools.partial(models.build, config, seq_len=128, num_classes=257)
    return build(decoding=decoding), drawn_params(build())


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens):
    return model.apply({"params": params}, tokens, tokens != PAD)


@functools.partial(jax.jit, static_argnums=0)
def sown(model, params, tokens):
    _, variables = model.apply(
        {"params": params}, tokens, tokens != PAD, train=True, mutable=["losses"]
    )
    return variables.get("losses", {})


def test_logits_do_not_depend_on_later_bytes():
    model, params = make()
    tokens, others = random_tokens(2, 1, 101)
    for i in np.random.default_rng(0).integers(0, 100, 3):
        changed = np.where(np.arange(101) > i, others, tokens)
        one, other = (np.asarray(apply(model, params, x)) for x in (tokens, changed))
        np.testing.assert_allclose(one[:, : i + 1], other[:, : i + 1], atol=1e-4)
        assert np.abs(one[:, i + 1 :] - other[:, i + 1 :]).max() > 0.1


@functools.partial(jax.jit, static_argnums=0)
def prefill(model, params, tokens):
    """Logits of prompts, from a model for decoding and its unstacked parameters."""
    return model.apply({"params": params}, tokens, tokens != PAD, method="prefill")[0]


def test_padding_changes_no_logit():
    """Neither padding after a sequence nor padding before a prompt does."""
    model, params = make()
    tokens = random_tokens(1, 77)
    want = apply(model, params, tokens)
    after = apply(model, params, np.pad(tokens, ((0, 0), (0, 24)), constant_values=PAD))
    np.testing.assert_allclose(np.asarray(after)[:, :77], want, atol=1e-4)
    padded = np.pad(tokens, ((0, 0), (24, 0)), constant_values=PAD)
    before = prefill(make(decoding=True)[0], unstack(params), padded)
    np.testing.assert_allclose(np.asarray(before)[:, 24:], want, atol=1e-4)


def test_decoding_equals_the_whole():
    """Prompts have different lengths, and decoding crosses the ends of blocks and tiles."""
    model, params = make()
    tokens, starts = random_tokens(2, 128), (0, 21)
    tokens[1, :21] = PAD
    decoder = Decoder(make(decoding=True)[0], unstack(params), tokens[:, :32], num_positions=96)
    found = [decoder.logits_BC[:, None]]
    found += [decoder.force(tokens[:, i : i + 32]) for i in (32, 64, 96)]
    got = np.concatenate(found, 1)
    # The whole model takes padding after a sequence instead.
    rolled = np.stack([np.roll(row, -start) for row, start in zip(tokens, starts)])
    for row, (start, want) in enumerate(zip(starts, np.asarray(apply(model, params, rolled)))):
        np.testing.assert_allclose(got[row], want[31 - start : 128 - start], atol=1e-4)


@pytest.mark.parametrize("field", ["wavelet.padding", "frequency.padding"])
def test_what_leaks_is_chosen_by_the_config_and_cannot_decode(field):
    model, params = make(**{field: "circular"})
    tokens, others = random_tokens(2, 1, 101)
    changed = np.where(np.arange(101) > 50, others, tokens)
    one, other = (np.asarray(apply(model, params, x)) for x in (tokens, changed))
    assert np.abs(one[:, :51] - other[:, :51]).max() > 0.01
    decoding = make(**{field: "circular"}, decoding=True)[0]
    with pytest.raises(ValueError, match="padding 'circular' sees later positions"):
        prefill(decoding, unstack(params), tokens)


def spectral_distance(x_ND, y_ND, points):
    """The definition, bin by bin, in float64."""
    x_ND, y_ND = np.float64(x_ND), np.float64(y_ND)
    found = []
    for f in range(points // 2 + 1):
        wave_N = np.exp(-2j * np.pi * f * np.arange(len(x_ND)) / points)
        px, py = (np.abs(wave_N @ a_ND) ** 2 / len(x_ND) + FLOOR for a_ND in (x_ND, y_ND))
        found.append((np.log(px) - np.log(py)) ** 2)
    return np.mean(found)


def test_spectral_distance_equals_its_definition_on_valid_positions():
    x, y = np.float32(np.random.default_rng(0).normal(size=(2, 3, 50, 4)))
    counts = (50, 33, 1)
    mask = np.arange(50) < np.reshape(counts, (3, 1))
    distance = jax.jit(log_spectral_distance)
    got = distance(x, y, mask)
    want = [spectral_distance(x[b, :n], y[b, :n], 50) for b, n in enumerate(counts)]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert distance(x, x, mask).tolist() == [0, 0, 0]
    nothing = distance(x, y, np.zeros_like(mask))
    assert nothing.tolist() == [0, 0, 0]


@functools.partial(jax.jit, static_argnums=0)
def intermediates(model, params, tokens):
    _, variables = model.apply(
        {"params": params}, tokens, tokens != PAD, capture_intermediates=True
    )
    return variables["intermediates"]


def test_consistency_compares_hidden_states_with_the_next_embeddings():
    """Hidden states and embeddings are captured here, then shifted and cut without the model."""
    model, params = make()
    tokens = random_tokens(2, 60)
    tokens[1, 41:] = PAD
    seen = intermediates(model, params, tokens)
    x_BND, embedded_BND = (np.asarray(seen[name]["__call__"][0]) for name in ("norm", "embedding"))
    (got_B,) = sown(model, params, tokens)["consistency"]
    for b, n in enumerate((60, 41)):
        want = spectral_distance(x_BND[b, : n - 1], embedded_BND[b, 1:n], 60)
        assert got_B[b] == pytest.approx(0.1 * want, rel=1e-3)


def test_the_embeddings_to_be_predicted_are_constants():
    """Gradients to the targets would only make all embeddings similar."""
    model, params = make()
    tokens = np.int32([[7] * 39 + [255]])

    def loss(params):
        return jnp.sum(sown(model, params, tokens)["consistency"][0])

    gradient = np.asarray(jax.jit(jax.grad(loss))(params)["embedding"]["phase"])
    # The last byte is never an input, only a target; what remains is the rounding error of FFTs.
    assert np.abs(gradient[255]).max() <= 1e-5 * np.abs(gradient[7]).max()


def test_without_a_weight_nothing_is_sown():
    model, params = make(consistency_weight=0.0)
    assert jax.eval_shape(functools.partial(sown, model), params, random_tokens(1, 60)) == {}


def test_it_learns_a_repeated_pattern():
    model, _ = make()
    params = initial_params(model)
    tokens = jnp.tile(jnp.asarray([b"spectral "[i] for i in range(9)], jnp.int32), 7)[None]
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits, variables = model.apply(
                {"params": params}, tokens, tokens != PAD, train=True, mutable=["losses"]
            )
            by_position = optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            )
            return jnp.mean(by_position) + sum(map(jnp.sum, jax.tree.leaves(variables)))

        value, gradient = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, state = tx.update(gradient, state)
        return value, optax.apply_updates(params, updates), state

    losses, state = [], jax.jit(tx.init)(params)
    for _ in range(15):
        value, params, state = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_is_finite_with_its_gradients():
    model, params = make(dtype="bfloat16")
    tokens = jnp.asarray(random_tokens(1, 60))

    def loss(params):
        logits, variables = model.apply(
            {"params": params}, tokens, tokens != PAD, train=True, mutable=["losses"]
        )
        return jnp.mean(jnp.square(logits)) + jnp.sum(variables["losses"]["consistency"][0])

    values = jax.jit(jax.value_and_grad(loss))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(values))
