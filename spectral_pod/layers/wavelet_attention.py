"""Convolutional attention on the bands of a wavelet transform: the mixer of SpectralLLM."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pywt

from spectral_pod import fields
from spectral_pod.fields import Bound, Positive
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import Dense
from spectral_pod.layers.mixer import Mixer, option, shared
from spectral_pod.layers.parameter import parameter
from spectral_pod.layers.probes import probe, valid_mean
from spectral_pod.ops import long_conv
from spectral_pod.ops.choice import Choice
from spectral_pod.ops.online_conv import ProductBlock, product_step
from spectral_pod.ops.wavelet import causal_wavedec, reach
from spectral_pod.parallel.sharding import constrain


class ProductInputs(NamedTuple):
    """The state of the convolution of q with k after prefill: both, and where sequences start.

    The decoder prepares the products of all layers together and continues with a `ProductBlock`.
    """

    q_BPD: jax.Array  # float32
    k_BPD: jax.Array  # float32
    start_B: jax.Array  # int32, the first valid position


class WaveletState(NamedTuple):
    product: ProductInputs | ProductBlock
    products_BTD: jax.Array  # float32, the last products, as far back as two filters reach
    values_BTD: jax.Array  # float32, the last values, as far back as one filter reaches
    count_B1: jax.Array  # int32, the number of valid positions so far


class WaveletAttention(Mixer):
    """`W_o sum_j w_j c_j * v_j` with `c_j[t] = sum_{s <= t} q_j[s] k_j[t - s] / sqrt(t + 1)`.

    q, k and v are projections of x, each decomposed into the bands j of the causal undecimated
    wavelet transform. The original design projects a decomposed x; as the transform is linear and
    acts per channel, this differs in the biases only. w_j is learned per band and head. q and k are
    normalised to a mean square of 1 per position and head, so that c is of order 1 wherever they
    are incoherent. t counts valid positions.

    A band is a filter h_j, and filters commute with convolutions of sequences:

        q_j conv k_j = (h_j conv q) conv (h_j conv k) = h_j conv h_j conv (q conv k).

    So one product, q conv k, serves all bands; it is decomposed twice. A decoding step needs that
    product, from `ops/online_conv.py`, and its last values, as far back as two filters reach.

    Attributes:
      wavelet: name of an orthogonal wavelet of PyWavelets.
      levels: levels of the transform, which has one more band than levels.
      num_heads: H, which must divide the width.
      padding: 'linear' is causal; with 'circular' (the original design) positions see later ones,
        which rules out decoding.
      method: how the linear product is computed, see `ops/long_conv.py`.
    """

    wavelet: str = option("name", "db4")
    levels: Annotated[int, Bound(1, 17, "1 to 16")] = 3  # the reach doubles with each
    num_heads: Positive = 4
    padding: Literal["linear", "circular"] = "linear"
    method: str = shared("long_conv", "auto")

    section = "wavelet"
    one_directional = True
    divisible = (("model.hidden_dim", "model.wavelet.num_heads"),)
    sees_future = (("model.wavelet.padding", "circular"),)
    definition = (("model.long_conv", "real"),)

    @classmethod
    def check(cls, config: Architecture) -> None:
        families = [name for name in pywt.wavelist(kind="discrete") if name != "dmey"]
        orthogonal = [name for name in families if pywt.Wavelet(name).orthogonal]
        fields.one_of("config.model.wavelet.name", config.option("wavelet.name"), orthogonal)

    @classmethod
    def halo(cls, config: Architecture) -> int:
        return reach(config.option("wavelet.name"), config.option("wavelet.levels"))

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        return {"causal_product": long_conv.resolve_product(config.long_conv)}

    def setup(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"a width of {self.width} cannot be split into {self.num_heads} heads")
        self.heads = (self.num_heads, self.width // self.num_heads)
        axes = ("embed", "head", None)
        self.query, self.key, self.value = (Dense(self.heads, axes, self.dtype) for _ in range(3))
        ones = parameter(nn.initializers.ones_init(), None, "head", group="undecayed")
        self.weight_SH = self.param("level_weight", ones, (self.levels + 1, self.num_heads))
        self.out = Dense(self.width, ("head", None, "embed"), self.dtype)

    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        q_BND, k_BND, v_BND = self._projected(x_BND, mask_BN)
        start_B, count_BN = _counted(mask_BN)
        c_BND = self._product(q_BND, k_BND, start_B)
        return self._mixed(*self._decomposed(c_BND, v_BND), count_BN, mask_BN)

    def init_state(self, batch: int) -> WaveletState:
        def zeros(count: int) -> jax.Array:
            return jnp.zeros((batch, count, self.width), jnp.float32)

        inputs = ProductInputs(zeros(0), zeros(0), jnp.zeros(batch, jnp.int32))
        before = reach(self.wavelet, self.levels)
        count_B1 = jnp.zeros((batch, 1), jnp.int32)
        return WaveletState(inputs, zeros(2 * before), zeros(before), count_B1)

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, WaveletState]:
        """The outputs at the prompts' positions, and the state after them.

        Raises:
          ValueError: the product is circular.
        """
        if self.padding == "circular":
            raise ValueError(
                "wavelet attention with padding 'circular' sees later positions, so it cannot "
                "decode; use 'linear'"
            )
        q_BPD, k_BPD, v_BPD = self._projected(x_BPD, mask_BP)
        start_B, count_BP = _counted(mask_BP)
        c_BPD = self._product(q_BPD, k_BPD, start_B)
        before = reach(self.wavelet, self.levels)
        state = WaveletState(
            ProductInputs(q_BPD, k_BPD, start_B),
            _last(c_BPD, 2 * before),
            _last(v_BPD, before),
            count_BP[:, -1:],
        )
        return self._mixed(*self._decomposed(c_BPD, v_BPD), count_BP, mask_BP), state

    def advance(
        self, x_B1D: jax.Array, state: WaveletState, position: jax.Array
    ) -> tuple[jax.Array, WaveletState]:
        q_B1D, k_B1D, v_B1D = self._projected(x_B1D)
        assert isinstance(state.product, ProductBlock)
        c_BD, product = product_step(state.product, q_B1D[:, 0], k_B1D[:, 0], position)
        once_ST = _responses(self.wavelet, self.levels)
        twice_ST = np.stack([np.convolve(h_T, h_T) for h_T in once_ST])
        products_SB1D, products_BTD = _respond(state.products_BTD, c_BD[:, None], twice_ST)
        values_SB1D, values_BTD = _respond(state.values_BTD, v_B1D, once_ST)
        count_B1 = state.count_B1 + 1
        y_B1D = self._mixed(products_SB1D, values_SB1D, count_B1)
        return y_B1D, WaveletState(product, products_BTD, values_BTD, count_B1)

    def _projected(self, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> list[jax.Array]:
        """q, k and v, float32 [B, N, D], zero where invalid."""
        projected = []
        for project in (self.query, self.key, self.value):
            p_BNHK = project(x_BND).astype(jnp.float32)
            if mask_BN is not None:
                p_BNHK = jnp.where(mask_BN[..., None, None], p_BNHK, 0.0)
            if project is not self.value:
                mean_square = jnp.mean(jnp.square(p_BNHK), axis=-1, keepdims=True)
                p_BNHK *= jax.lax.rsqrt(mean_square + 1e-6)
            p_BND = p_BNHK.reshape(x_BND.shape)
            projected.append(constrain(p_BND, "batch", "position", "channel"))
        return projected

    def _product(self, q_BND: jax.Array, k_BND: jax.Array, start_B: jax.Array) -> jax.Array:
        q_BDN, k_BDN = jnp.swapaxes(q_BND, 1, 2), jnp.swapaxes(k_BND, 1, 2)
        if self.padding == "circular":
            return jnp.swapaxes(long_conv.circular_product(q_BDN, k_BDN), 1, 2)
        c_BDN = long_conv.causal_product(q_BDN, k_BDN, start_B, self.method)
        return jnp.swapaxes(c_BDN, 1, 2)

    def _decomposed(
        self, c_BND: jax.Array, v_BND: jax.Array
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Products and values of every band, each [B, N, D]."""
        # Only band i of the transform of band i is used; the compiler removes the others.
        products = tuple(
            causal_wavedec(band_BND, self.wavelet, self.levels)[i]
            for i, band_BND in enumerate(causal_wavedec(c_BND, self.wavelet, self.levels))
        )
        return products, causal_wavedec(v_BND, self.wavelet, self.levels)

    def _mixed(
        self,
        products: Sequence[jax.Array] | jax.Array,
        values: Sequence[jax.Array] | jax.Array,
        count_BN: jax.Array,
        mask_BN: jax.Array | None = None,
    ) -> jax.Array:
        def bands() -> Iterator[jax.Array]:
            for weight_H, c_BND, v_BND in zip(self.weight_SH, products, values):
                shape = *v_BND.shape[:2], *self.heads
                yield weight_H[None, None, :, None] * (c_BND * v_BND).reshape(shape)

        def share() -> jax.Array:
            energies = [valid_mean(jnp.square(x_BNHK), mask_BN) for x_BNHK in bands()]
            energy_SH = jnp.sum(jnp.stack(energies), axis=-1)
            return energy_SH / jnp.maximum(jnp.sum(energy_SH, axis=0, keepdims=True), 1e-30)

        probe(self, "band_share", share)
        y_BNHK = sum(bands())
        y_BNHK *= jax.lax.rsqrt(count_BN.astype(jnp.float32))[..., None, None]
        return constrain(self.out(y_BNHK), "batch", "position", "width")


def _counted(mask_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The start of each sequence, int32 [B], and its valid positions so far, [B, N], at least 1."""
    start_B = jnp.argmax(mask_BN, axis=1).astype(jnp.int32)
    position_1N = jnp.arange(1, mask_BN.shape[1] + 1)[None]
    return start_B, jnp.maximum(position_1N - start_B[:, None], 1)


def _respond(
    recent_BTD: jax.Array, x_B1D: jax.Array, taps_ST: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """The outputs of S filters for one more input, [S, B, 1, D], and the last T - 1 inputs."""
    recent_BTD = jnp.concatenate([recent_BTD, x_B1D], axis=1)
    reversed_ST = jnp.asarray(taps_ST[:, ::-1], jnp.float32)
    y_SBD = jnp.einsum("btd,st->sbd", recent_BTD, reversed_ST, precision="highest")
    return y_SBD[:, :, None], recent_BTD[:, 1:]


def _last(x_BND: jax.Array, count: int) -> jax.Array:
    """The last `count` positions, with zeros before the first."""
    padded = jnp.pad(x_BND, ((0, 0), (count, 0), (0, 0)))
    return padded[:, padded.shape[1] - count :]


def _responses(wavelet: str, levels: int) -> np.ndarray:
    """The impulse responses of the bands of `causal_wavedec`, float64 [S, T]."""
    low = np.asarray(pywt.Wavelet(wavelet).rec_lo)
    num_taps = reach(wavelet, levels) + 1
    a_T = np.eye(1, num_taps)[0]
    details: list[np.ndarray] = []
    for level in range(levels):
        dilated = np.zeros((len(low) - 1) * 2**level + 1)
        dilated[:: 2**level] = low / low.sum()
        smooth_T = np.convolve(a_T, dilated)[:num_taps]
        a_T, details = smooth_T, [a_T - smooth_T, *details]
    return np.stack([a_T, *details])
