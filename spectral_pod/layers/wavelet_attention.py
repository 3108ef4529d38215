"""Convolutional attention on the levels of a wavelet transform: the mixer of SpectralLLM."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pywt

from spectral_pod.layers.dense import Dense
from spectral_pod.ops.long_conv import causal_product, circular_product
from spectral_pod.ops.online_conv import ProductBlock, product_step
from spectral_pod.ops.wavelet import causal_wavedec
from spectral_pod.parallel.sharding import constrain, partitioned


class WaveletAttention(nn.Module):
    """`W_o sum_j w_j c_j * v_j` with `c_j[t] = sum_{s <= t} q_j[s] k_j[t - s] / sqrt(t + 1)`.

    q, k and v, projections of x, are all decomposed into the bands j of the causal undecimated
    wavelet transform. Projecting a decomposed x, as the original design does, is the same, but
    for biases: the transform is linear and per channel. w_j is learned per band and head. Every
    position's q and k have a mean square of 1 in each head, so that c is of order 1 at any
    position where they are incoherent. t counts valid positions.

    A band is a filter h_j, and filters commute with products of sequences:

        q_j conv k_j = (h_j conv q) conv (h_j conv k) = h_j conv h_j conv (q conv k).

    So one product of sequences serves all bands; it is decomposed twice. A step needs that product,
    from `ops/online_conv.py`, and its last values, as far back as two filters reach.

    Attributes:
      wavelet: name of an orthogonal wavelet of PyWavelets.
      levels: of the transform, which has one band more.
      num_heads: H, a divisor of the width.
      padding: 'linear', or 'circular' as in the original design: positions see later ones, and
        nothing can be decoded.
      method: of the linear product, see `ops/long_conv.py`.
    """

    wavelet: str
    levels: int
    num_heads: int
    padding: str
    dtype: Any
    method: str = "auto"

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; see `layers/mixers.py` for `position`.

        Raises:
          ValueError: the width is no multiple of the heads, or a circular product is to decode.
        """
        width = x_BND.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"a width of {width} cannot be split into {self.num_heads} heads")
        prefill = self.is_mutable_collection("cache") and not self.is_initializing()
        if self.padding == "circular" and (prefill or position is not None):
            raise ValueError(
                "wavelet attention with padding 'circular' sees later positions, so it cannot "
                "decode; use 'linear'"
            )
        heads = (self.num_heads, width // self.num_heads)
        q_BND, k_BND, v_BND = (
            self._projection(name, heads, x_BND, mask_BN) for name in ("query", "key", "value")
        )
        products: Iterable[jax.Array]
        values: Iterable[jax.Array]
        if position is None:
            products, values, count_BN = self._whole(q_BND, k_BND, v_BND, mask_BN, prefill)
        else:
            products, values, count_BN = self._step(q_BND, k_BND, v_BND, position)
        ones = partitioned(nn.initializers.ones_init(), None, "head")
        weight_SH = self.param("level_weight", ones, (self.levels + 1, self.num_heads))
        y_BNHK = sum(
            weight_H[None, None, :, None] * (c_BND * v_BND).reshape(*v_BND.shape[:2], *heads)
            for weight_H, c_BND, v_BND in zip(weight_SH, products, values)
        )
        y_BNHK *= jax.lax.rsqrt(count_BN.astype(jnp.float32))[..., None, None]
        y_BND = Dense(width, ("head", None, "embed"), self.dtype, name="out")(y_BNHK)
        return constrain(y_BND, "batch", "position", "width")

    def _projection(
        self, name: str, heads: tuple[int, int], x_BND: jax.Array, mask_BN: jax.Array
    ) -> jax.Array:
        """float32 [B, N, D], zero where invalid."""
        p_BNHK = Dense(heads, ("embed", "head", None), self.dtype, name=name)(x_BND)
        p_BNHK = jnp.where(mask_BN[..., None, None], p_BNHK.astype(jnp.float32), 0.0)
        if name != "value":
            mean_square = jnp.mean(jnp.square(p_BNHK), axis=-1, keepdims=True)
            p_BNHK *= jax.lax.rsqrt(mean_square + 1e-6)
        return constrain(p_BNHK.reshape(x_BND.shape), "batch", "position", "channel")

    def _whole(
        self,
        q_BND: jax.Array,
        k_BND: jax.Array,
        v_BND: jax.Array,
        mask_BN: jax.Array,
        prefill: bool,
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
        """Products and values, [B, N, D] for every band, and the number of positions up to each."""
        start_B = jnp.argmax(mask_BN, axis=1).astype(jnp.int32)
        count_BN = jnp.maximum(jnp.arange(1, mask_BN.shape[1] + 1)[None] - start_B[:, None], 1)
        q_BDN, k_BDN = jnp.swapaxes(q_BND, 1, 2), jnp.swapaxes(k_BND, 1, 2)
        if self.padding == "circular":
            c_BDN = circular_product(q_BDN, k_BDN)
        else:
            c_BDN = causal_product(q_BDN, k_BDN, start_B, self.method)
        c_BND = jnp.swapaxes(c_BDN, 1, 2)
        if prefill:
            self.put_variable("cache", "product_q", q_BND)
            self.put_variable("cache", "product_k", k_BND)
            self.put_variable("cache", "product_start", start_B)
            reach = _responses(self.wavelet, self.levels).shape[1]
            self.put_variable("cache", "recent_products", _last(c_BND, 2 * reach - 2))
            self.put_variable("cache", "recent_values", _last(v_BND, reach - 1))
            self.put_variable("cache", "count", count_BN[:, -1:])
        bands = causal_wavedec(c_BND, self.wavelet, self.levels)
        # Of the transform of a band only the band itself; the compiler drops the others.
        products = tuple(
            causal_wavedec(band_BND, self.wavelet, self.levels)[i]
            for i, band_BND in enumerate(bands)
        )
        return products, causal_wavedec(v_BND, self.wavelet, self.levels), count_BN

    def _step(
        self, q_B1D: jax.Array, k_B1D: jax.Array, v_B1D: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same of one more position, [S, B, 1, D], from the responses of the bands."""
        block = ProductBlock(*self.get_variable("cache", "product_block"))
        c_BD, block = product_step(block, q_B1D[:, 0], k_B1D[:, 0], position)
        self.put_variable("cache", "product_block", block)
        count_B1 = self.get_variable("cache", "count") + 1
        self.put_variable("cache", "count", count_B1)
        once_ST = _responses(self.wavelet, self.levels)
        twice_ST = np.stack([np.convolve(h_T, h_T) for h_T in once_ST])
        products = self._respond("recent_products", c_BD[:, None], twice_ST)
        return products, self._respond("recent_values", v_B1D, once_ST), count_B1

    def _respond(self, name: str, x_B1D: jax.Array, taps_ST: np.ndarray) -> jax.Array:
        """[S, B, 1, D]: the newest outputs of filters of an input whose past the cache holds."""
        recent_BTD = jnp.concatenate([self.get_variable("cache", name), x_B1D], axis=1)
        self.put_variable("cache", name, recent_BTD[:, 1:])
        reversed_ST = jnp.asarray(taps_ST[:, ::-1], jnp.float32)
        return jnp.einsum("btd,st->sbd", recent_BTD, reversed_ST, precision="highest")[:, :, None]


def _last(x_BND: jax.Array, count: int) -> jax.Array:
    """The last positions, zeros before the first."""
    padded = jnp.pad(x_BND, ((0, 0), (count, 0), (0, 0)))
    return padded[:, padded.shape[1] - count :]


def _responses(wavelet: str, levels: int) -> np.ndarray:
    """The bands of `causal_wavedec` as filters, [S, T]: what they make of a single one at 0."""
    low = np.asarray(pywt.Wavelet(wavelet).rec_lo)
    num_taps = (len(low) - 1) * (2**levels - 1) + 1
    a_T = np.eye(1, num_taps)[0]
    details: list[np.ndarray] = []
    for level in range(levels):
        dilated = np.zeros((len(low) - 1) * 2**level + 1)
        dilated[:: 2**level] = low / low.sum()
        smooth_T = np.convolve(a_T, dilated)[:num_taps]
        a_T, details = smooth_T, [a_T - smooth_T, *details]
    return np.stack([a_T, *details])
