"""Embeddings: tokens to vectors."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.parameter import parameter
from spectral_pod.parallel.sharding import constrain


class Embedding(nn.Module):
    """A learned vector per token."""

    vocab_size: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """int [B, L] to [B, L, D] in `dtype`."""
        init = parameter(nn.initializers.normal(1.0), "vocab", "embed", group="decayed")
        table_VD = self.param("embedding", init, (self.vocab_size, self.width))
        # Gather the table, not the batch: a lookup in a split table would gather all indices.
        return lookup(constrain(table_VD.astype(self.dtype), None, None), tokens_BL)


class HarmonicEmbedding(nn.Module):
    """A sum of sines per token: `e[v, d] = sum_h A[v, h] sin(2 pi f[v, h] t_d + phi[v, h])`.

    t_d = d / D, so a sine of frequency f has f periods across the width. The initial frequencies of
    a token are drawn one from each of `num_harmonics` equal intervals of [0, D / 2], which ends at
    the Nyquist frequency. The sines of a token are then nearly orthogonal, no two tokens share a
    frequency, and with A^2 = 2 / `num_harmonics` each vector has a mean square of about 1.
    """

    vocab_size: int
    width: int
    dtype: Any
    num_harmonics: int

    @nn.compact
    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        """int [B, L] to [B, L, D] in `dtype`."""
        return lookup(constrain(self.table().astype(self.dtype), None, None), tokens_BL)

    def table(self) -> jax.Array:
        """float32 [V, D]: the vectors of all tokens, of which there are fewer than positions."""
        shape = (self.vocab_size, self.num_harmonics)

        def draw(name: str, init: Callable[..., jax.Array]) -> jax.Array:
            return self.param(name, parameter(init, "vocab", None, group="undecayed"), shape)

        amplitude_VH = draw("amplitude", nn.initializers.constant((2 / shape[1]) ** 0.5))
        frequency_VH = draw("frequency", self._init_frequency)
        phase_VH = draw("phase", nn.initializers.uniform(2 * jnp.pi))
        t_D = jnp.arange(self.width, dtype=jnp.float32) / self.width
        angle_VHD = 2 * jnp.pi * frequency_VH[..., None] * t_D[None, None] + phase_VH[..., None]
        return jnp.sum(amplitude_VH[..., None] * jnp.sin(angle_VHD), axis=1)

    def _init_frequency(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        part = self.width / 2 / self.num_harmonics
        first_H = part * jnp.arange(self.num_harmonics, dtype=jnp.float32)
        return first_H[None] + jax.random.uniform(key, shape, maxval=part)


@jax.custom_vjp
def lookup(table_VE: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """The embeddings [B, L, E] of tokens. Their gradient is a product with one-hot tokens, for a
    table this small several times as fast as a scatter-add."""
    return table_VE[tokens_BL]


def _lookup_forward(
    table_VE: jax.Array, tokens_BL: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table_VE[tokens_BL], (tokens_BL, table_VE[:, :0])


def _lookup_backward(
    residuals: tuple[jax.Array, jax.Array], dx_BLE: jax.Array
) -> tuple[jax.Array, None]:
    tokens_BL, like_VE = residuals
    one_hot_VBL = jnp.arange(len(like_VE))[:, None, None] == tokens_BL[None]
    dtable_VE = jnp.tensordot(
        one_hot_VBL.astype(dx_BLE.dtype), dx_BLE, 2, preferred_element_type=jnp.float32
    )
    return dtable_VE.astype(like_VE.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
