"""The selective spectral mixer: filters that depend on the content of the sequence."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.fields import Positive
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import Dense
from spectral_pod.layers.long_convolution import FilterCache, FilterInputs, LongConvolution
from spectral_pod.layers.mixer import Mixer, shared
from spectral_pod.layers.parameter import parameter
from spectral_pod.layers.probes import frequency_share, probe, response, valid_mean
from spectral_pod.layers.spectral import (
    gate_parameters,
    initial_kernels,
    rms_gate,
    rms_gated,
    transfer_functions,
)
from spectral_pod.ops import fft
from spectral_pod.ops.choice import Choice
from spectral_pod.parallel.sharding import constrain, filter_axis

BLOCK = 64  # valid positions that share a causal context, the mean of all before their block


class SelectiveState(NamedTuple):
    count_B1: jax.Array  # int32, the number of valid positions so far
    sum_B1D: jax.Array  # float32, the sum of their inputs
    weights_B1R: jax.Array  # float32, c of the current block
    long: FilterInputs | FilterCache | None  # None for the form 'broadcast'


class SelectiveLayer(Mixer):
    """Filters sequence b by `W[b] = W_0 + sum_r c[b, r] U_r`, with `c = MLP(mean of x)`.

    The R + 1 filters are shared by all sequences and their outputs are mixed by c, so that no
    sequence needs a filter of its own. If `causal`, the filters are causal convolutions and each
    block of positions has its own c, from the mean over the valid positions before the block (zero
    for the first block).

    Attributes:
      form: 'low_rank', or 'broadcast' (the original design), where W[b] is one number per channel
        for all frequencies, which is a gain rather than a filter.
      rank: R.
      energy_gate: 'rms' multiplies the result y by `sigmoid(a log rms(y) + b)`, as `SpectralLayer`
        does; of 'low_rank' only.
      energy_bias: see `SpectralLayer`.
      filter, decay, long_conv: of the causal filters, see `LongConvolution`.
      method, initial, tau_min, tau_max: of the filters that are not causal, see `SpectralLayer`.
    """

    form: Literal["low_rank", "broadcast"] = "low_rank"
    rank: Positive = 8
    energy_gate: Literal["rms", "none"] = "none"
    energy_bias: float = shared("spectral.energy_bias", 0.0)
    filter: str = shared("hyena.filter", "explicit")
    decay: str = shared("hyena.decay", "learned")
    long_conv: str = shared("long_conv", "auto")
    method: str = shared("spectral.method", "auto")
    initial: str = shared("spectral.initial", "noise")
    tau_min: float = shared("spectral.tau_min", 1.0)
    tau_max: float = shared("spectral.tau_max", 0.0)

    section = "selective"
    definition = (("model.long_conv", "real"), ("model.spectral.method", "plain"))

    @classmethod
    def has_frequencies(cls, config: Architecture) -> bool:
        return not config.causal and config.option("selective.form") == "low_rank"

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        if config.causal:
            return LongConvolution.methods(config, batch)
        n, width = config.max_positions, config.hidden_dim * (config.option("selective.rank") + 1)
        method = config.option("spectral.method")
        return {"spectral_filter": fft.resolve(method, n, 2 * n, config.dtype, width)}

    def setup(self) -> None:
        features = self.width if self.form == "broadcast" else self.rank
        self.context_hidden = Dense(self.width, ("embed", "hidden"), self.dtype)
        self.context_out = Dense(features, ("hidden", None), self.dtype)
        if self.form == "broadcast":
            return
        if self.energy_gate == "rms":
            self.gate = gate_parameters(self, self.width, self.energy_bias)
        width, points = self.width * (self.rank + 1), 2 * self.max_positions
        if self.causal:
            self.long = LongConvolution(
                width, self.max_positions, self.filter, self.decay, method=self.long_conv
            )
        else:
            axes = (None, "frequency", filter_axis(width))
            kernels = initial_kernels(self.initial, self.tau_min, self.tau_max)
            init = parameter(transfer_functions(kernels), *axes, group="dynamics")
            self.transfer = self.param("filter", init, (2, points // 2 + 1, width))

    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        x_BND = self._masked(x_BND, mask_BN)
        c_BNR, _ = self._whole_weights(x_BND, mask_BN)
        if self.form == "broadcast":
            return self._mixed(x_BND, c_BNR, mask_BN)
        x_BNC = self._repeated(x_BND)
        if self.causal:
            return self._mixed(self.long(x_BNC), c_BNR, mask_BN)
        w_FC = jax.lax.complex(self.transfer[0], self.transfer[1])
        probe(self, "response", lambda: response(w_FC))
        probe(self, "frequency_share", lambda: frequency_share(self.transfer))
        u_BNC = fft.spectral_filter(x_BNC, w_FC, 2 * self.max_positions, self.method)
        return self._mixed(u_BNC, c_BNR, mask_BN)

    def init_state(self, batch: int) -> SelectiveState:
        features = self.width if self.form == "broadcast" else self.rank
        return SelectiveState(
            jnp.zeros((batch, 1), jnp.int32),
            jnp.zeros((batch, 1, self.width), jnp.float32),
            jnp.zeros((batch, 1, features), jnp.float32),
            None if self.form == "broadcast" else self.long.init_state(batch),
        )

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, SelectiveState]:
        x_BPD = self._masked(x_BPD, mask_BP)
        c_BPR, count_BP = self._whole_weights(x_BPD, mask_BP)
        u_BPC, long = x_BPD, None
        if self.form != "broadcast":
            u_BPC, long = self.long.prefill(self._repeated(x_BPD))
        sum_B1D = jnp.sum(x_BPD.astype(jnp.float32), axis=1)[:, None]
        state = SelectiveState(count_BP[:, -1:], sum_B1D, c_BPR[:, -1:], long)
        return self._mixed(u_BPC, c_BPR, mask_BP), state

    def advance(
        self, x_B1D: jax.Array, state: SelectiveState, position: jax.Array
    ) -> tuple[jax.Array, SelectiveState]:
        x_B1D = x_B1D.astype(self.dtype)
        count_B1, sum_B1D, c_B1R, long = state
        new_B11 = (count_B1 % BLOCK == 0)[..., None]
        c_B1R = jnp.where(new_B11, self._weights(sum_B1D, count_B1), c_B1R)
        u_B1C = x_B1D
        if long is not None:
            u_B1C, long = self.long.advance(self._repeated(x_B1D), long, position)
        sum_B1D = sum_B1D + x_B1D.astype(jnp.float32)
        return self._mixed(u_B1C, c_B1R), SelectiveState(count_B1 + 1, sum_B1D, c_B1R, long)

    def _masked(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        return jnp.where(mask_BN[..., None], x_BND, jnp.zeros((), x_BND.dtype)).astype(self.dtype)

    def _weights(self, sum_BGD: jax.Array, count_BG: jax.Array) -> jax.Array:
        """c, float32 [B, G, R] ([B, G, D] if 'broadcast'), from sums over `count_BG` positions."""
        mean_BGD = sum_BGD / jnp.maximum(count_BG, 1)[..., None].astype(jnp.float32)
        mean_BGD = constrain(mean_BGD, "batch", None, None)
        c_BGR = self.context_out(nn.gelu(self.context_hidden(mean_BGD))).astype(jnp.float32)
        return constrain(c_BGR, "batch", None, None)

    def _whole_weights(self, x_BND: jax.Array, mask_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """c of each position, [B, N, R], if causal, else of the sequence, [B, 1, R]; and the number
        of valid positions up to each one, [B, N]."""
        x_BND = x_BND.astype(jnp.float32)
        # Not split, as [B, N] is small: XLA would communicate at every step of the cumulative sum.
        count_BN = jnp.cumsum(constrain(mask_BN, "batch", None), axis=1)
        if not self.causal:
            return self._weights(jnp.sum(x_BND, axis=1)[:, None], count_BN[:, -1:]), count_BN
        num_blocks = -(-x_BND.shape[1] // BLOCK)
        block_BN = jnp.maximum(count_BN - 1, 0) // BLOCK
        is_in_BNG = block_BN[..., None] == jnp.arange(num_blocks)[None, None]
        is_in_BNG = constrain(is_in_BNG, "batch", "position", None).astype(jnp.float32)
        own_BGD = jnp.einsum("bng,bnd->bgd", is_in_BNG, x_BND, precision="highest")
        before_BGD = jnp.cumsum(jnp.pad(own_BGD[:, :-1], ((0, 0), (1, 0), (0, 0))), axis=1)
        count_1G = BLOCK * jnp.arange(num_blocks)[None]
        c_BGR = self._weights(before_BGD, count_1G)
        return jnp.einsum("bng,bgr->bnr", is_in_BNG, c_BGR, precision="highest"), count_BN

    def _repeated(self, x_BND: jax.Array) -> jax.Array:
        """The filters' inputs [B, N, D (R + 1)]: every channel R + 1 times.

        The copies of a channel are adjacent, so that channels split over devices stay split.
        """
        return jnp.repeat(constrain(x_BND, "batch", "position", "channel"), self.rank + 1, axis=2)

    def _mixed(
        self, u_BNC: jax.Array, c_BNR: jax.Array, mask_BN: jax.Array | None = None
    ) -> jax.Array:
        c_BNR = c_BNR.astype(self.dtype)
        if self.form == "broadcast":
            return constrain(u_BNC * c_BNR, "batch", "position", "width")
        u_BNC = constrain(u_BNC, "batch", "position", "channel").astype(self.dtype)
        u_BNDR = u_BNC.reshape(*u_BNC.shape[:2], self.width, self.rank + 1)
        c_BNR = jnp.pad(c_BNR, ((0, 0), (0, 0), (1, 0)), constant_values=1)
        y_BND = jnp.sum(u_BNDR * c_BNR[:, :, None], axis=-1, dtype=jnp.float32)
        if self.energy_gate == "rms":
            probe(
                self, "energy_gate_mean", lambda: valid_mean(rms_gate(y_BND, *self.gate), mask_BN)
            )
            y_BND = rms_gated(y_BND, *self.gate)
        return constrain(y_BND.astype(self.dtype), "batch", "position", "width")
