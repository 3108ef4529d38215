"""The causal long-convolution mixer of Hyena (Poli et al. 2023), of order two."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import Dense
from spectral_pod.layers.short_convolution import ShortConvolution
from spectral_pod.ops.long_conv import causal_conv, circular_product
from spectral_pod.ops.online_conv import FilterBlock, filter_step
from spectral_pod.parallel.sharding import constrain, filter_axis, partitioned

FIXED_DECAY = 0.01  # of the original design: e^-4.6 after 460 positions
_BANDS = 16  # of the positional features of an implicit filter: 33 features, as Hyena has
_ORDER = 64  # width of its MLP
_FREQUENCY = 10.0  # of its sines


class CausalFilter(nn.Module):
    """A long filter per channel, under an exponential envelope `e^{-alpha t}`.

    Attributes:
      num_taps: T.
      parametrization: 'explicit' learns the taps; 'implicit' an MLP of t with sines, as Hyena.
      decay: 'learned' learns alpha per channel, log-spaced at first from 1 to 1 / T, so that the
        slowest channel reaches the whole context; 'fixed' is 0.01 (the original design), which
        forgets everything past some 460 positions.
    """

    num_taps: int
    parametrization: str
    decay: str

    @nn.compact
    def __call__(self, width: int) -> jax.Array:
        """float32 [D, T], of unit energy at first."""
        t_T = jnp.arange(self.num_taps, dtype=jnp.float32)
        alpha_D = self._alpha(width)
        taps_TD = {"explicit": self._explicit, "implicit": self._implicit}[self.parametrization](
            width
        )
        envelope_DT = jnp.exp(-alpha_D[:, None] * t_T[None])
        # Of the initial envelope: the norm of the taps is the optimizer's.
        energy_D = jnp.sum(jnp.square(jax.lax.stop_gradient(envelope_DT)), axis=1)
        return taps_TD.T * envelope_DT * jax.lax.rsqrt(energy_D)[:, None]

    def _alpha(self, width: int) -> jax.Array:
        if self.decay == "fixed":
            return jnp.full((width,), FIXED_DECAY, jnp.float32)

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return -jnp.log(jnp.float32(self.num_taps)) * jnp.linspace(0.0, 1.0, shape[0])

        return jnp.exp(self.param("log_decay", partitioned(init, "width"), (width,)))

    def _explicit(self, width: int) -> jax.Array:
        init = partitioned(nn.initializers.normal(1.0), "frequency", filter_axis(width))
        return self.param("filter", init, (self.num_taps, width))

    def _implicit(self, width: int) -> jax.Array:
        """Features t / T, cos and sin of bands, through two layers of sines."""
        t_T1 = jnp.arange(self.num_taps, dtype=jnp.float32)[:, None] / self.num_taps
        angles = 2 * jnp.pi * t_T1 * jnp.linspace(1e-4, _BANDS - 1, _BANDS)[None]
        x = jnp.concatenate([t_T1, jnp.cos(angles), -jnp.sin(angles)], axis=1)
        for i, features in enumerate((_ORDER, _ORDER)):
            x = jnp.sin(_FREQUENCY * self._linear(f"filter_{i}", x, features, "width"))
        # Sines have a mean square of 1/2.
        return jnp.sqrt(2.0) * self._linear("filter_out", x, width, filter_axis(width))

    def _linear(self, name: str, x: jax.Array, features: int, axis: str) -> jax.Array:
        init = partitioned(nn.initializers.lecun_normal(), None, axis)
        return jnp.dot(x, self.param(name, init, (x.shape[1], features)))


class LongConvolution(nn.Module):
    """Every channel convolved with a filter of its own.

    Attributes:
      num_taps, parametrization, decay: see `CausalFilter`.
      padding: 'linear', or 'circular', with which positions see later ones and nothing can be
        decoded.
      method: see `ops/long_conv.py`.
    """

    num_taps: int
    parametrization: str
    decay: str
    padding: str = "linear"
    method: str = "auto"

    @nn.compact
    def __call__(self, v_BND: jax.Array, position: jax.Array | None = None) -> jax.Array:
        """[B, N, D] to [B, N, D] in the dtype of v; see `layers/mixers.py` for `position`.

        Invalid positions must be zero already.

        Raises:
          ValueError: a circular convolution is to decode.
        """
        prefill = self.is_mutable_collection("cache") and not self.is_initializing()
        if self.padding == "circular" and (prefill or position is not None):
            raise ValueError(
                "a long convolution with padding 'circular' sees later positions, so it cannot "
                "decode; use 'linear'"
            )
        if position is not None:
            block = FilterBlock(*self.get_variable("cache", "block"))
            taps_TD = self.get_variable("cache", "taps")
            y_BD, block = filter_step(taps_TD, block, v_BND[:, 0], position)
            self.put_variable("cache", "block", block)
            return y_BD[:, None].astype(v_BND.dtype)
        filters = CausalFilter(self.num_taps, self.parametrization, self.decay, name="filter")
        h_DT = filters(v_BND.shape[-1])
        if prefill:
            self.put_variable("cache", "taps", h_DT.T)
            self.put_variable("cache", "inputs", v_BND.astype(jnp.float32))
        v_BDN = jnp.swapaxes(v_BND, 1, 2)
        if self.padding == "circular":
            h_BDN = jnp.broadcast_to(h_DT[None, :, : v_BDN.shape[2]], v_BDN.shape)
            return jnp.swapaxes(circular_product(v_BDN, h_BDN).astype(v_BND.dtype), 1, 2)
        return jnp.swapaxes(causal_conv(v_BDN, h_DT, self.method), 1, 2)


class HyenaLayer(nn.Module):
    """`W_o (u * (h conv v))` with u, v short convolutions of projections of x.

    Attributes:
      max_positions: taps of the filter.
      filter, decay: see `CausalFilter`.
      short_conv: width of the depthwise causal convolution of u and v; 1 has none (the original
        design).
      method: see `ops/long_conv.py`.
    """

    max_positions: int
    filter: str
    decay: str
    short_conv: int
    dtype: Any
    method: str = "auto"

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; see `layers/mixers.py` for `position`."""
        width = x_BND.shape[-1]
        uv_BN2D = Dense((2, width), ("embed", None, "hidden"), self.dtype, name="in")(x_BND)
        uv_BN2D = jnp.where(mask_BN[..., None, None], uv_BN2D, jnp.zeros((), self.dtype))
        uv_BN2D = constrain(uv_BN2D, "batch", "position", None, "channel")
        if self.short_conv > 1:
            short = ShortConvolution(self.short_conv, (None, "channel"), self.dtype, name="short")
            uv_BN2D = short(uv_BN2D, position)
        u_BND, v_BND = uv_BN2D[:, :, 0], uv_BN2D[:, :, 1]
        long = LongConvolution(
            self.max_positions, self.filter, self.decay, method=self.method, name="long"
        )
        y_BND = long(v_BND, position)
        y_BND = Dense(width, ("hidden", "embed"), self.dtype, name="out")(u_BND * y_BND)
        return constrain(y_BND, "batch", "position", "width")
