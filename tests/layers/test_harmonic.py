"""Harmonic embeddings: their formula, and that tokens start out distinct."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.layers.embedding import HarmonicEmbedding
from spectral_pod.shapes import VOCAB_SIZE


@functools.cache
def make(width, dtype="float32"):
    module = HarmonicEmbedding(VOCAB_SIZE, width, jnp.dtype(dtype), 16)
    tokens = jnp.arange(VOCAB_SIZE).reshape(4, -1)
    embedded, params = jax.jit(module.init_with_output)(jax.random.key(0), tokens)
    return np.asarray(embedded), nn.unbox(params)["params"]


def test_equals_its_formula():
    got, params = make(96)
    A, f, phi = (np.asarray(params[n], np.float64) for n in ("amplitude", "frequency", "phase"))
    want = np.zeros((VOCAB_SIZE, 96))
    for d in range(96):
        want[:, d] = np.sum(A * np.sin(2 * np.pi * f * d / 96 + phi), axis=1)
    assert got.shape == (4, VOCAB_SIZE // 4, 96)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-4)


@pytest.mark.parametrize("width", [64, 256, 512])
def test_vectors_have_unit_variance_and_differ(width):
    e_VD = np.asarray(make(width)[0], np.float64).reshape(VOCAB_SIZE, width)
    norms = np.linalg.norm(e_VD, axis=1) / np.sqrt(width)
    assert np.abs(norms - 1).max() <= 0.4
    cosines = e_VD @ e_VD.T / np.outer(norms, norms) / width
    # For random vectors the largest of 33,670 cosines is near 4.2 / sqrt(D).
    assert (cosines - np.eye(VOCAB_SIZE)).max() <= 6 / np.sqrt(width)


def test_the_table_is_as_well_conditioned_as_a_random_one():
    """A random table has the condition number (1 + sqrt r) / (1 - sqrt r), where r = V / D."""
    width = 512
    e_VD = np.asarray(make(width)[0], np.float64).reshape(VOCAB_SIZE, width)
    root = np.sqrt(VOCAB_SIZE / width)
    least, *_, greatest = np.linalg.eigvalsh(e_VD @ e_VD.T)
    assert np.sqrt(greatest / least) <= 1.5 * (1 + root) / (1 - root)


def test_bfloat16():
    got, _ = make(64, "bfloat16")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), make(64)[0], atol=0.02)
