"""Causal convolutions as long as the sequence, with a learned filter per channel."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.parameter import parameter
from spectral_pod.layers.probes import probe, response_of_taps
from spectral_pod.ops import long_conv
from spectral_pod.ops.choice import Choice
from spectral_pod.ops.online_conv import FilterBlock, filter_step
from spectral_pod.parallel.sharding import filter_axis

FIXED_DECAY = 0.01  # of the original design: e^-4.6 after 460 positions
_BANDS = 16  # frequencies of an implicit filter's positional features, 33 in all as in Hyena
_ORDER = 64  # hidden width of an implicit filter's MLP
_FREQUENCY = 10.0  # of the sine activations of that MLP


class CausalFilter(nn.Module):
    """A long filter per channel, multiplied by an exponential envelope `e^{-alpha t}`.

    Attributes:
      num_taps: T.
      parametrization: 'explicit' learns the taps; 'implicit' learns an MLP of t with sine
        activations, as in Hyena.
      decay: 'learned' learns alpha per channel, initially log-spaced from 1 to 1 / T, so that the
        slowest channel reaches the whole context; 'fixed' is alpha = 0.01 (the original design),
        which forgets everything past about 460 positions.
      skip: adds a learned factor per channel to its first tap, so that the convolution adds a
        multiple of its input, as Hyena's does.
    """

    num_taps: int
    parametrization: str
    decay: str
    skip: bool = False

    @nn.compact
    def __call__(self, width: int) -> jax.Array:
        """The filters, float32 [D, T], initially of unit energy on average."""
        t_T = jnp.arange(self.num_taps, dtype=jnp.float32)
        alpha_D = self._alpha(width)
        taps_TD = {"explicit": self._explicit, "implicit": self._implicit}[self.parametrization](
            width
        )
        probe(self, "decay", lambda: jnp.exp(-alpha_D))
        envelope_DT = jnp.exp(-alpha_D[:, None] * t_T[None])
        # Whatever the decay, the envelope has unit energy: the norm of the taps is left to the
        # optimizer.
        energy_D = jnp.sum(jnp.square(envelope_DT), axis=1)
        h_DT = taps_TD.T * envelope_DT * jax.lax.rsqrt(energy_D)[:, None]
        if self.skip:
            init = parameter(nn.initializers.normal(1.0), "width", group="undecayed")
            h_DT = h_DT.at[:, 0].add(self.param("skip", init, (width,)))
        probe(self, "response", lambda: response_of_taps(h_DT))
        return h_DT

    def _alpha(self, width: int) -> jax.Array:
        if self.decay == "fixed":
            return jnp.full((width,), FIXED_DECAY, jnp.float32)

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return -jnp.log(jnp.float32(self.num_taps)) * jnp.linspace(0.0, 1.0, shape[0])

        boxed = parameter(init, "width", group="dynamics")
        return jnp.exp(self.param("log_decay", boxed, (width,)))

    def _explicit(self, width: int) -> jax.Array:
        axes = ("tap", filter_axis(width))
        init = parameter(nn.initializers.normal(1.0), *axes, group="dynamics")
        return self.param("filter", init, (self.num_taps, width))

    def _implicit(self, width: int) -> jax.Array:
        """Taps [T, D]: an MLP of t / T and its sines and cosines, with sine activations."""
        t_T1 = jnp.arange(self.num_taps, dtype=jnp.float32)[:, None] / self.num_taps
        angles = 2 * jnp.pi * t_T1 * jnp.linspace(1e-4, _BANDS - 1, _BANDS, dtype=jnp.float32)[None]
        x = jnp.concatenate([t_T1, jnp.cos(angles), -jnp.sin(angles)], axis=1)
        for i, features in enumerate((_ORDER, _ORDER)):
            x = jnp.sin(_FREQUENCY * self._linear(f"filter_{i}", x, features, "width"))
        # Makes the mean square 1: that of the last sines is 1/2.
        return jnp.sqrt(2.0) * self._linear("filter_out", x, width, filter_axis(width))

    def _linear(self, name: str, x: jax.Array, features: int, axis: str) -> jax.Array:
        init = parameter(nn.initializers.lecun_normal(), None, axis, group="dynamics")
        return jnp.dot(x, self.param(name, init, (x.shape[1], features)))


class FilterInputs(NamedTuple):
    """The state of a long convolution after prefill: its filters and all inputs so far.

    The decoder prepares the filters of all layers together and continues with a `FilterCache`.
    """

    taps_DT: jax.Array  # float32 [D, T]
    x_BPD: jax.Array  # float32


class FilterCache(NamedTuple):
    """The state between decoding steps; `generate/decode.py` replaces the block when it ends."""

    taps_TD: jax.Array  # float32, the first `online_conv.BLOCK` taps of the filters
    block: FilterBlock


class LongConvolution(nn.Module):
    """Convolves each channel with its own filter. Inputs must be zero at invalid positions.

    Attributes:
      width: D.
      num_taps, parametrization, decay, skip: see `CausalFilter`.
      padding: 'linear' is causal; with 'circular' positions see later ones, which rules out
        decoding.
      method: see `ops/long_conv.py`.
    """

    width: int
    num_taps: int
    parametrization: str
    decay: str
    padding: str = "linear"
    method: str = "auto"
    skip: bool = False

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        """As `Mixer.methods`."""
        n = config.max_positions
        return {"causal_conv": long_conv.resolve(config.long_conv, n, n, config.dtype)}

    def setup(self) -> None:
        self.filter = CausalFilter(self.num_taps, self.parametrization, self.decay, self.skip)

    def __call__(self, v_BND: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in the dtype of v."""
        return self._convolve(v_BND, self.filter(self.width))

    def _convolve(self, v_BND: jax.Array, h_DT: jax.Array) -> jax.Array:
        v_BDN = jnp.swapaxes(v_BND, 1, 2)
        if self.padding == "circular":
            h_BDN = jnp.broadcast_to(h_DT[None, :, : v_BDN.shape[2]], v_BDN.shape)
            return jnp.swapaxes(long_conv.circular_product(v_BDN, h_BDN).astype(v_BND.dtype), 1, 2)
        return jnp.swapaxes(long_conv.causal_conv(v_BDN, h_DT, self.method), 1, 2)

    def extend(self, v_BND: jax.Array, before_BTD: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """As a call, where v follows the inputs `before`; also returns those for the next chunk.

        These are as many as the filter has taps, so that it reaches equally far everywhere.
        """
        B, N, D = v_BND.shape
        if before_BTD is None:
            before_BTD = jnp.zeros((B, self.num_taps, D), v_BND.dtype)
        longer = jnp.concatenate([before_BTD, v_BND], axis=1)
        return self(longer)[:, self.num_taps :], longer[:, N:]

    def init_state(self, batch: int) -> FilterInputs:
        return FilterInputs(self.filter(self.width), jnp.zeros((batch, 0, self.width), jnp.float32))

    def prefill(self, v_BPD: jax.Array) -> tuple[jax.Array, FilterInputs]:
        """Convolves prompts; returns [B, P, D] in the dtype of v, and the state after them.

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
