"""Delta memory: an associative memory updated by the delta rule (`ops/delta_rule.py`)."""

from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.errors import ConfigError
from spectral_pod.fields import Bound, Positive
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import Dense
from spectral_pod.layers.mixer import Mixer
from spectral_pod.layers.parameter import parameter
from spectral_pod.layers.probes import probe, valid_mean
from spectral_pod.layers.short_convolution import ShortConvolution
from spectral_pod.ops.choice import Choice
from spectral_pod.ops.delta_rule import DeltaResult, delta_rule, resolve
from spectral_pod.parallel.sharding import constrain

FORGETTING_RATES = (0.001, 0.1)  # initial rates of the first and the last head, per position


class DeltaState(NamedTuple):
    memory_BHVK: jax.Array  # float32
    short: tuple[jax.Array, ...]  # states of the short convolutions of q, k and v, if any


class DeltaMemoryLayer(Mixer):
    """At each position in turn, writes its value under its key, then reads with its query.

    Attributes:
      num_heads, head_dim: H and K; there are H memories of [K, K].
      normalize_keys: L2-normalises q and k. Without it (the original design) the recurrence would
        diverge on Gaussian keys if writes were not clipped.
      gated: multiplies the memory by a learned gate at every position and head (Yang et al. 2024,
        "Gated Delta Networks"). The log of the gate is -softplus(.) and starts near -r, with the
        rates r of the heads log-spaced over `FORGETTING_RATES`, the range of Mamba's step sizes:
        memories of 1000 to 10 positions. In the configuration this field selects the memories of a
        model's default pattern (`models/`); in an explicit pattern 'delta' has no gate and
        'gated_delta' has one.
      short_conv: taps of a depthwise causal convolution of q, k and v, which allows a value to be
        written under the key of an earlier position; 1 disables it.
      clip: the largest |e||k| of a write, in units of sqrt(K), the length of ordinary values. 0 is
        no limit. It is for keys that are not normalised: with unit keys errors are of the size of
        values, unless keys nearly coincide (docs/math.md, 4.2). The original limit is 10
        for K = 64, that is 1.25 here.
      beta_min, beta_max: the range of the write strength beta, a scaled sigmoid. With the original
        0.01 to 0.3 no write can replace a value: the key then recalls 0.7 old + 0.3 new at best.
      method: 'chunked', 'batched', 'fused', 'fused_chunks' or 'recurrent', which compute the same
        function, or 'auto' to choose by platform and sizes (`ops/delta_rule.py`).
    """

    num_heads: Positive = 1
    head_dim: Positive = 64
    normalize_keys: bool = True
    gated: bool = False
    short_conv: Positive = 1
    clip: Annotated[float, Bound(0, 1e6, "0 or more, below 1e6")] = 4.0
    beta_min: float = 0.0
    beta_max: float = 1.0
    method: Literal["auto", "chunked", "batched", "fused", "fused_chunks", "recurrent"] = "auto"

    section = "memory"
    one_directional = True
    divisible = (("model.memory.num_heads", "mesh.tensor"),)
    definition = (("model.memory.method", "recurrent"),)

    @classmethod
    def from_config(cls, config: Architecture, **fixed: Any) -> Mixer:
        return super().from_config(config, **({"gated": False} | fixed))

    @classmethod
    def check(cls, config: Architecture) -> None:
        low, high = config.option("memory.beta_min"), config.option("memory.beta_max")
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"config.model.memory.beta_min, beta_max are {low}, {high}; they need "
                "0 <= beta_min < beta_max <= 1"
            )

    @classmethod
    def halo(cls, config: Architecture) -> int:
        return config.option("memory.short_conv") - 1

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        width, heads = config.option("memory.head_dim"), config.option("memory.num_heads")
        method = resolve(config.option("memory.method"), width, width, batch * heads)
        return {"delta_rule": method}

    def setup(self) -> None:
        def dense(features: tuple[int, ...], axes: tuple[str | None, ...]) -> Dense:
            return Dense(features, axes, self.dtype)

        heads, axes = (self.num_heads, self.head_dim), ("embed", "head", None)
        self.query, self.key, self.value = (dense(heads, axes) for _ in range(3))
        if self.short_conv > 1:
            self.shorts = [
                ShortConvolution(heads, self.short_conv, ("head", None), self.dtype, name=name)
                for name in ("short_query", "short_key", "short_value")
            ]
        self.beta = dense((self.num_heads,), ("embed", "head"))
        if self.gated:
            self.gate = dense((self.num_heads,), ("embed", "head"))
        scale = parameter(nn.initializers.constant(0.1), group="dynamics")
        self.scale = self.param("scale_memory", scale, ())
        self.out = Dense(self.width, ("head", None, "embed"), self.dtype)

    def extend(
        self, x_BND: jax.Array, mask_BN: jax.Array, carry: DeltaState | None
    ) -> tuple[jax.Array, DeltaState]:
        """Carries the memory itself, and the recent inputs of short convolutions."""
        carry = self.init_state(len(x_BND)) if carry is None else carry
        qkv, states = self._qkv(x_BND, mask_BN), []
        for i, (short, before) in enumerate(zip(self._shorts(), carry.short)):
            states.append(short.recent(qkv[i], before))
            qkv[i] = short.extend(qkv[i], before)
        o_BNHV, memory_BHVK = self._memory(
            x_BND, qkv, mask_BN=mask_BN, state_BHVK=carry.memory_BHVK, method=self.method
        )
        return self._read(o_BNHV), DeltaState(memory_BHVK, tuple(states))

    def init_state(self, batch: int) -> DeltaState:
        memory_BHVK = jnp.zeros((batch, self.num_heads, self.head_dim, self.head_dim), jnp.float32)
        return DeltaState(memory_BHVK, tuple(short.init_state(batch) for short in self._shorts()))

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, DeltaState]:
        qkv, states = self._qkv(x_BPD, mask_BP), []
        for i, short in enumerate(self._shorts()):
            states.append(short.recent(qkv[i]))
            qkv[i] = short(qkv[i])
        o_BPHV, memory_BHVK = self._memory(x_BPD, qkv, mask_BN=mask_BP, method=self.method)
        return self._read(o_BPHV), DeltaState(memory_BHVK, tuple(states))

    def advance(
        self, x_B1D: jax.Array, state: DeltaState, position: jax.Array
    ) -> tuple[jax.Array, DeltaState]:
        qkv, shorts = self._qkv(x_B1D), []
        for i, (short, recent) in enumerate(zip(self._shorts(), state.short)):
            qkv[i], recent = short.advance(qkv[i], recent)
            shorts.append(recent)
        o_B1HV, memory_BHVK = self._memory(
            x_B1D, qkv, state_BHVK=state.memory_BHVK, method="recurrent"
        )
        return self._read(o_B1HV), DeltaState(memory_BHVK, tuple(shorts))

    def _shorts(self) -> tuple[ShortConvolution, ...]:
        return tuple(self.shorts) if self.short_conv > 1 else ()

    def _qkv(self, x_BND: jax.Array, mask_BN: jax.Array | None = None) -> list[jax.Array]:
        """q, k and v [B, N, H, K]; with short convolutions, zero at invalid positions."""
        qkv = [project(x_BND) for project in (self.query, self.key, self.value)]
        if mask_BN is None or self.short_conv == 1:
            return qkv
        return [jnp.where(mask_BN[..., None, None], x, jnp.zeros((), x.dtype)) for x in qkv]

    def _memory(
        self, x_BND: jax.Array, qkv: list[jax.Array], **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The values read, [B, N, H, V], and the memory after the last position, [B, H, V, K].

        Sows `clipped_writes`, the share of all writes.
        """
        q_BNHK, k_BNHK, v_BNHV = qkv
        if self.normalize_keys:
            q_BNHK, k_BNHK = unit(q_BNHK), unit(k_BNHK)
        logits_BNH = self.beta(x_BND).astype(jnp.float32)
        beta_BNH = self.beta_min + (self.beta_max - self.beta_min) * jax.nn.sigmoid(logits_BNH)
        log_gate_BNH = None
        if self.gated:
            logits_BNH = self.gate(x_BND)
            rates_H = jnp.geomspace(*FORGETTING_RATES, self.num_heads, dtype=jnp.float32)
            start_BNH = jnp.broadcast_to(jnp.log(jnp.expm1(rates_H)), logits_BNH.shape)
            log_gate_BNH = -jax.nn.softplus(logits_BNH.astype(jnp.float32) + start_BNH)
        clip = self.clip * self.head_dim**0.5 if self.clip else None
        inputs = q_BNHK, k_BNHK, v_BNHV, beta_BNH
        result = delta_rule(*inputs, log_gate_BNH=log_gate_BNH, clip=clip, **options)
        writes = self.num_heads * jnp.sum(options.get("mask_BN", jnp.ones(x_BND.shape[:2], bool)))
        share = jnp.sum(result.clipped_BH) / jnp.maximum(writes, 1).astype(jnp.float32)
        self.sow("metrics", "clipped_writes", share)
        self._show(beta_BNH, log_gate_BNH, result, options.get("mask_BN"))
        return result.o_BNHV, result.state_BHVK

    def _show(
        self,
        beta_BNH: jax.Array,
        log_gate_BNH: jax.Array | None,
        result: DeltaResult,
        mask_BN: jax.Array | None,
    ) -> None:
        """Shows the memory's write strength, forgetting, clipping and size, by head."""

        def clip_share() -> jax.Array:
            count = beta_BNH[..., 0].size if mask_BN is None else jnp.sum(mask_BN)
            clipped_H = jnp.sum(result.clipped_BH, axis=0).astype(jnp.float32)
            return clipped_H / jnp.maximum(count, 1).astype(jnp.float32)

        def norm() -> jax.Array:
            square_BH = jnp.sum(jnp.square(result.state_BHVK), axis=(2, 3))
            return jnp.mean(jnp.sqrt(square_BH), axis=0)

        probe(self, "beta_mean", lambda: valid_mean(beta_BNH, mask_BN))
        if log_gate_BNH is not None:
            probe(self, "decay", lambda: valid_mean(jnp.exp(log_gate_BNH), mask_BN))
        if self.clip:
            probe(self, "clip_share", clip_share)
        probe(self, "memory_norm", norm)

    def _read(self, o_BNHV: jax.Array) -> jax.Array:
        # Scaled before the projection, where the gradient of the scale has fewer terms.
        y_BND = self.out(o_BNHV * self.scale.astype(o_BNHV.dtype))
        return constrain(y_BND, "batch", "position", "width")


class GatedDeltaMemoryLayer(DeltaMemoryLayer):
    """A `DeltaMemoryLayer` with gates."""

    @classmethod
    def from_config(cls, config: Architecture, **fixed: Any) -> Mixer:
        return super().from_config(config, gated=True, **fixed)


@jax.custom_vjp
def unit(x: jax.Array) -> jax.Array:
    """float32 `x / |x|` over the last axis; the zero vector stays zero.

    Only x itself, in its own dtype, and its length are stored for the backward pass.
    """
    return _unit_forward(x)[0]


def _unit_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x32 = x.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) + 1e-12)
    return x32 * rate, (x, rate)


def _unit_backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    """dx = dy / |x| - x (x . dy) / |x|^3."""
    x, rate = jax.lax.optimization_barrier(residuals)
    x32 = x.astype(jnp.float32)
    dx = rate * dy - x32 * (rate**3 * jnp.sum(x32 * dy, axis=-1, keepdims=True))
    return (dx.astype(x.dtype),)


unit.defvjp(_unit_forward, _unit_backward)
