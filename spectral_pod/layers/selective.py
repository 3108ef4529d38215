"""The selective spectral mixer: filters that depend on what the sequence holds."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import Dense
from spectral_pod.layers.hyena import LongConvolution
from spectral_pod.layers.spectral import decaying_noise
from spectral_pod.ops.fft import spectral_filter
from spectral_pod.parallel.sharding import constrain, filter_axis, partitioned

BLOCK = 64  # valid positions that share a causal context, the mean of all those before them


class SelectiveLayer(nn.Module):
    """`W[b] = W_0 + sum_r c[b, r] U_r` applied to x, with `c = MLP(mean of x)`.

    The R + 1 filters are the same for all sequences; their results are mixed, so that no sequence
    needs a filter of its own. If `causal`, the filters are causal convolutions and c is that of the
    position's block: of the mean over the valid positions before it, zero for the first block.

    Attributes:
      max_positions: N the filters are made for.
      form: 'low_rank'; or 'broadcast' (the original design): W[b] is one number a channel, the same
        for all frequencies. That is no filter but the product of x with it.
      rank: R.
      filter, decay: of the causal filters, see `CausalFilter`.
      method: of these, see `ops/long_conv.py`, or else of the others, see `ops/fft.py`.
    """

    max_positions: int
    form: str
    rank: int
    causal: bool
    filter: str
    decay: str
    method: str
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; see `layers/mixers.py` for `position`."""
        x_BND = jnp.where(mask_BN[..., None], x_BND, jnp.zeros((), x_BND.dtype)).astype(self.dtype)
        c_BNR = self._weights(x_BND, mask_BN, position).astype(self.dtype)
        if self.form == "broadcast":
            return constrain(x_BND * c_BNR, "batch", "position", "width")
        u_BNDR = self._filtered(x_BND, position)
        c_BNR = jnp.pad(c_BNR, ((0, 0), (0, 0), (1, 0)), constant_values=1)
        y_BND = jnp.sum(u_BNDR * c_BNR[:, :, None], axis=-1, dtype=jnp.float32)
        return constrain(y_BND.astype(self.dtype), "batch", "position", "width")

    def _weights(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None
    ) -> jax.Array:
        """c, float32 [B, 1 or N, R], or [B, 1 or N, D] of the form 'broadcast'."""
        width = x_BND.shape[-1]
        features = width if self.form == "broadcast" else self.rank
        hidden = Dense(width, ("embed", "hidden"), self.dtype, name="context_hidden")
        out = Dense(features, ("hidden", None), self.dtype, name="context_out")

        def weights(sum_BGD: jax.Array, count_BG: jax.Array) -> jax.Array:
            mean_BGD = sum_BGD / jnp.maximum(count_BG, 1)[..., None].astype(jnp.float32)
            mean_BGD = constrain(mean_BGD, "batch", None, None)
            c_BGR = out(nn.gelu(hidden(mean_BGD))).astype(jnp.float32)
            return constrain(c_BGR, "batch", None, None)

        x_BND = x_BND.astype(jnp.float32)
        if position is not None:
            count_B1, sum_B1D = (
                self.get_variable("cache", "count"),
                self.get_variable("cache", "sum"),
            )
            new_B11 = (count_B1 % BLOCK == 0)[..., None]
            c_B1R = self.get_variable("cache", "weights")
            c_B1R = jnp.where(new_B11, weights(sum_B1D, count_B1), c_B1R)
            self._remember(count_B1 + mask_BN.astype(jnp.int32), sum_B1D + x_BND, c_B1R)
            return c_B1R
        # Positions whole, [B, N] is small: XLA would otherwise exchange at every step of the sum.
        count_BN = jnp.cumsum(constrain(mask_BN, "batch", None), axis=1)
        sum_BD = jnp.sum(x_BND, axis=1)
        if not self.causal:
            return weights(sum_BD[:, None], count_BN[:, -1:])
        num_blocks = -(-x_BND.shape[1] // BLOCK)
        block_BN = jnp.maximum(count_BN - 1, 0) // BLOCK
        is_in_BNG = block_BN[..., None] == jnp.arange(num_blocks)[None, None]
        is_in_BNG = constrain(is_in_BNG, "batch", "position", None).astype(jnp.float32)
        own_BGD = jnp.einsum("bng,bnd->bgd", is_in_BNG, x_BND, precision="highest")
        before_BGD = jnp.cumsum(jnp.pad(own_BGD[:, :-1], ((0, 0), (1, 0), (0, 0))), axis=1)
        count_1G = BLOCK * jnp.arange(num_blocks)[None]
        c_BGR = weights(before_BGD, count_1G)
        c_BNR = jnp.einsum("bng,bgr->bnr", is_in_BNG, c_BGR, precision="highest")
        if self.is_mutable_collection("cache"):
            self._remember(count_BN[:, -1:], sum_BD[:, None], c_BNR[:, -1:])
        return c_BNR

    def _remember(self, count_B1: jax.Array, sum_B1D: jax.Array, c_B1R: jax.Array) -> None:
        for name, value in (("count", count_B1), ("sum", sum_B1D), ("weights", c_B1R)):
            self.put_variable("cache", name, value)

    def _filtered(self, x_BND: jax.Array, position: jax.Array | None) -> jax.Array:
        """x through every filter, [B, N, D, R + 1], in `dtype`.

        The filters of a channel are neighbours, so that channels split over devices stay so.
        """
        B, N, D = x_BND.shape
        x_BNC = jnp.repeat(constrain(x_BND, "batch", "position", "channel"), self.rank + 1, axis=2)
        if self.causal:
            long = LongConvolution(
                self.max_positions, self.filter, self.decay, method=self.method, name="long"
            )
            u_BNC = long(x_BNC, position)
        else:
            u_BNC = self._spectral(x_BNC)
        u_BNC = constrain(u_BNC, "batch", "position", "channel").astype(self.dtype)
        return u_BNC.reshape(B, N, D, self.rank + 1)

    def _spectral(self, x_BNC: jax.Array) -> jax.Array:
        fft_length, width = 2 * self.max_positions, x_BNC.shape[2]
        init = partitioned(decaying_noise, None, "frequency", filter_axis(width))
        real_imag = self.param("filter", init, (2, fft_length // 2 + 1, width))
        w_FC = jax.lax.complex(real_imag[0], real_imag[1])
        return spectral_filter(x_BNC, w_FC, fft_length, self.method)
