"""Associative memory that corrects its errors: the delta rule as a layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import Dense
from spectral_pod.layers.short_convolution import ShortConvolution
from spectral_pod.ops.delta_rule import delta_rule
from spectral_pod.parallel.sharding import constrain, partitioned

FORGETTING_RATES = (0.001, 0.1)  # of the first and the last head


class DeltaMemoryLayer(nn.Module):
    """Writes every position's value under its key and reads with its query, in order.

    Attributes:
      num_heads, head_dim: H memories of [K, K].
      normalize_keys: L2-normalises q and k; without it (the original design) the recurrence
        diverges on Gaussian keys but for its clip.
      beta_range: the learning rate beta = sigmoid(.) is scaled into it. The original (0.01, 0.3)
        cannot overwrite: after one write a key recalls 0.7 old + 0.3 new.
      method: 'chunked' or 'recurrent', the same numbers (`ops/delta_rule.py`).
      gated: forgets a learned part of the memory at every position and head (Gated DeltaNet). Its
        log is -softplus(.) and starts near -r, with the rates r of the heads log-spaced over the
        range of Mamba's step sizes: `FORGETTING_RATES`, memories of 1000 to 10 positions.
      short_conv: width of a depthwise causal convolution of q, k and v, with which a key can be
        that of the position before its value; 1 has none.
    """

    num_heads: int
    head_dim: int
    normalize_keys: bool
    beta_range: tuple[float, float]
    method: Any
    dtype: Any
    gated: bool = False
    short_conv: int = 1

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; see `layers/mixers.py` for `position`."""
        decoding = position is not None
        state_BHVK = self.get_variable("cache", "memory") if decoding else None
        heads = (self.num_heads, self.head_dim)
        q_BNHK, k_BNHK, v_BNHV = (
            Dense(heads, ("embed", "head", None), self.dtype, name=name)(x_BND)
            for name in ("query", "key", "value")
        )
        if self.short_conv > 1:
            q_BNHK, k_BNHK, v_BNHV = (
                ShortConvolution(self.short_conv, ("head", None), self.dtype, name=f"short_{name}")(
                    jnp.where(mask_BN[..., None, None], x, jnp.zeros((), x.dtype)), position
                )
                for name, x in (("query", q_BNHK), ("key", k_BNHK), ("value", v_BNHV))
            )
        if self.normalize_keys:
            q_BNHK, k_BNHK = _unit(q_BNHK), _unit(k_BNHK)
        low, high = self.beta_range
        logits_BNH = Dense((self.num_heads,), ("embed", "head"), self.dtype, name="beta")(x_BND)
        beta_BNH = low + (high - low) * jax.nn.sigmoid(logits_BNH.astype(jnp.float32))
        log_gate_BNH = None
        if self.gated:
            logits_BNH = Dense((self.num_heads,), ("embed", "head"), self.dtype, name="gate")(x_BND)
            rates_H = jnp.geomspace(*FORGETTING_RATES, self.num_heads)
            start_BNH = jnp.broadcast_to(jnp.log(jnp.expm1(rates_H)), logits_BNH.shape)
            log_gate_BNH = -jax.nn.softplus(logits_BNH.astype(jnp.float32) + start_BNH)
        o_BNHV, state_BHVK = delta_rule(
            q_BNHK,
            k_BNHK,
            v_BNHV,
            beta_BNH,
            log_gate_BNH=log_gate_BNH,
            state_BHVK=state_BHVK,
            mask_BN=mask_BN,
            method="recurrent" if decoding else self.method,  # of a single position
        )
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "memory", state_BHVK)
        # Before the projection, where there is less to sum for the scale's gradient.
        scale = self.param("scale_memory", partitioned(nn.initializers.constant(0.1)), ())
        o_BNHV = o_BNHV * scale.astype(o_BNHV.dtype)
        y_BND = Dense(x_BND.shape[-1], ("head", None, "embed"), self.dtype, name="out")(o_BNHV)
        return constrain(y_BND, "batch", "position", "width")


def _unit(x: jax.Array) -> jax.Array:
    """float32 `x / |x|` over the last axis; the zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
