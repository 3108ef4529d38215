"""Causal convolutions as long as the sequence, with a learned filter per channel."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.parameter import parameter
from spectral_pod.ops.long_conv import causal_conv, circular_product
from spectral_pod.ops.online_conv import FilterBlock, filter_step
from spectral_pod.parallel.sharding import filter_axis

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

        boxed = parameter(init, "width", group="dynamics")
        return jnp.exp(self.param("log_decay", boxed, (width,)))

    def _explicit(self, width: int) -> jax.Array:
        axes = ("frequency", filter_axis(width))
        init = parameter(nn.initializers.normal(1.0), *axes, group="dynamics")
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
        init = parameter(nn.initializers.lecun_normal(), None, axis, group="dynamics")
        return jnp.dot(x, self.param(name, init, (x.shape[1], features)))


class FilterInputs(NamedTuple):
    """The state of a long convolution after its prompts: all that it has read.

    The decoder plans the filters of all layers together and continues with `FilterCache`.
    """

    taps_DT: jax.Array  # float32 [D, T]
    x_BPD: jax.Array  # float32


class FilterCache(NamedTuple):
    """What a step needs of the past; `generate/decode.py` renews the block when it ends."""

    taps_TD: jax.Array  # the first taps of the filter
    block: FilterBlock


class LongConvolution(nn.Module):
    """Every channel convolved with a filter of its own. Invalid positions must be zero already.

    Attributes:
      width: D.
      num_taps, parametrization, decay: see `CausalFilter`.
      padding: 'linear', or 'circular', with which positions see later ones and nothing can be
        decoded.
      method: see `ops/long_conv.py`.
    """

    width: int
    num_taps: int
    parametrization: str
    decay: str
    padding: str = "linear"
    method: str = "auto"

    def setup(self) -> None:
        self.filter = CausalFilter(self.num_taps, self.parametrization, self.decay)

    def __call__(self, v_BND: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in the dtype of v."""
        return self._convolve(v_BND, self.filter(self.width))

    def _convolve(self, v_BND: jax.Array, h_DT: jax.Array) -> jax.Array:
        v_BDN = jnp.swapaxes(v_BND, 1, 2)
        if self.padding == "circular":
            h_BDN = jnp.broadcast_to(h_DT[None, :, : v_BDN.shape[2]], v_BDN.shape)
            return jnp.swapaxes(circular_product(v_BDN, h_BDN).astype(v_BND.dtype), 1, 2)
        return jnp.swapaxes(causal_conv(v_BDN, h_DT, self.method), 1, 2)

    def init_state(self, batch: int) -> FilterInputs:
        return FilterInputs(self.filter(self.width), jnp.zeros((batch, 0, self.width)))

    def prefill(self, v_BPD: jax.Array) -> tuple[jax.Array, FilterInputs]:
        """The convolution of prompts, and the state after them.

        Raises:
          ValueError: the convolution is circular.
        """
        if self.padding == "circular":
            raise ValueError(
                "a long convolution with padding 'circular' sees later positions, so it cannot "
                "decode; use 'linear'"
            )
        h_DT = self.filter(self.width)
        return self._convolve(v_BPD, h_DT), FilterInputs(h_DT, v_BPD.astype(jnp.float32))

    def advance(
        self, v_B1D: jax.Array, state: FilterInputs | FilterCache, position: jax.Array
    ) -> tuple[jax.Array, FilterCache]:
        assert isinstance(state, FilterCache)
        y_BD, block = filter_step(state.taps_TD, state.block, v_B1D[:, 0], position)
        return y_BD[:, None].astype(v_B1D.dtype), FilterCache(state.taps_TD, block)
