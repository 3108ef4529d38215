"""The byte-latent encoder's convolution against XLA's, with its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from spectral_pod.layers.patching import ByteConvolution, NgramEmbeddings, Patches, _hash, _windows
from spectral_pod.shapes import VOCAB_SIZE

B, L, E, D = 3, 24, 5, 7


def _ours(patches, params, ids_BL):
    convolution = ByteConvolution(D, params["table"].dtype)
    nothing = jnp.zeros((B, patches.halo * patches.stride), jnp.int32)
    windows = _windows(ids_BL, nothing, patches)[:, :, -patches.taps :]
    return convolution.apply({"params": params["convolution"]}, params["table"], windows)


def _by_xla(patches, params, ids_BL):
    table_VE = jnp.pad(params["table"], ((0, 1), (0, 0)))  # id V, no byte, embeds to zero
    kernel_TED, bias_D = (params["convolution"][name] for name in ("kernel", "bias"))
    y_BND = jax.lax.conv_general_dilated(
        table_VE[ids_BL],
        kernel_TED,
        (patches.stride,),
        [(patches.taps - patches.stride, 0)],
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    return y_BND + bias_D[None, None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _with_gradients(fn, patches, params, ids_BL, dy):
    y, pullback = jax.vjp(lambda params: fn(patches, params, ids_BL), params)
    return y, pullback(dy)


@pytest.mark.parametrize("no_byte_from", [L, 13, 0])
@pytest.mark.parametrize(
    "patches",
    [Patches(), Patches(1), Patches(1, 1), Patches(2, 7), Patches(8, 8), Patches(4, ngrams=(2, 9))],
    ids=str,
)
def test_equals_a_strided_convolution_of_embeddings(patches, no_byte_from):
    rng = np.random.default_rng(0)
    shapes = {
        "table": (VOCAB_SIZE, E),
        "convolution": {"kernel": (patches.taps, E, D), "bias": (D,)},
    }
    params = jax.tree.map(
        lambda s: rng.normal(size=s).astype(np.float32),
        shapes,
        is_leaf=lambda s: type(s) is tuple,
    )
    ids_BL = rng.integers(0, VOCAB_SIZE, (B, L), np.int32)
    ids_BL = np.where(np.arange(L) < no_byte_from, ids_BL, np.int32(VOCAB_SIZE))
    dy = rng.normal(size=(B, L // patches.stride, D)).astype(np.float32)
    got, want = (_with_gradients(fn, patches, params, ids_BL, dy) for fn in (_ours, _by_xla))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "patches", [Patches(4, ngrams=(2, 3, 7)), Patches(1, 1, ngrams=(4,))], ids=str
)
def test_a_patch_gets_the_rows_of_the_ngrams_that_end_in_it(patches):
    """Against a loop over bytes, with the rows of one table for each n."""
    patches = dataclasses.replace(patches, ngram_rows=50)
    rng = np.random.default_rng(1)
    ids_BL = rng.integers(0, VOCAB_SIZE, (B, L), np.int32)
    ids_BL[1, 13:] = VOCAB_SIZE
    table = rng.normal(size=(50 * len(patches.ngrams), E)).astype(np.float32)
    kernel = rng.normal(size=(E, D)).astype(np.float32)
    nothing = jnp.zeros((B, patches.halo * patches.stride), jnp.int32)
    windows = _windows(jnp.asarray(ids_BL), nothing, patches)
    module = NgramEmbeddings(patches, E, D, jnp.float32)
    params = {"embedding": table, "project": {"kernel": kernel, "bias": np.zeros(D, np.float32)}}
    found = module.apply({"params": jax.tree.map(jnp.asarray, params)}, windows)
    expected = np.zeros((B, L // patches.stride, E))
    for b, position in np.ndindex(B, L):
        if ids_BL[b, position] == VOCAB_SIZE:
            continue
        before = [VOCAB_SIZE] * 16 + ids_BL[b, : position + 1].tolist()
        for i, n in enumerate(patches.ngrams):
            row = 50 * i + _hash_of(before[-n:]) % 50
            expected[b, position // patches.stride] += table[row]
    np.testing.assert_allclose(found, expected @ kernel, atol=1e-4)


def _hash_of(ids):
    found = 2_166_136_261
    for one in ids:
        found = (found ^ one) * 16_777_619 % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        found = (found ^ (found >> shift)) * factor % 2**32
    return found ^ (found >> 16)


def test_hashes_fill_the_rows_evenly():
    """Pairs of bytes, which differ little, and the chi-square of their rows."""
    pairs = np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1).reshape(-1, 2)
    counts = np.bincount(np.asarray(_hash(jnp.asarray(pairs))) % 512, minlength=512)
    assert stats.chisquare(counts).pvalue > 0.001
