"""Attention as mixers: over all positions, over a window of them, and in linear time."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.dense import Dense
from spectral_pod.ops.attention import attend, attention, local_attention
from spectral_pod.ops.linear_attention import linear_attention, linear_attention_step
from spectral_pod.parallel.sharding import constrain, partitioned


def project(x_BND: jax.Array, num_heads: int, dtype: Any) -> list[jax.Array]:
    """Queries, keys and values [B, N, H, K] of the calling module, H K = D, by one product.

    Raises:
      ValueError: the heads do not divide the width.
    """
    width = x_BND.shape[-1]
    if width % num_heads:
        raise ValueError(
            f"config.model.attention.num_heads is {num_heads} and does not divide "
            f"config.model.hidden_dim = {width}"
        )
    # Heads first: split over devices they stay so where Dense makes a matrix of its kernel.
    features, axes = (num_heads, 3, width // num_heads), ("embed", "head", None, None)
    qkv_BNH3K = Dense(features, axes, dtype, name="query_key_value")(x_BND)
    qkv_BNH3K = constrain(qkv_BNH3K, "batch", "position", "head", None, None)
    return [qkv_BNH3K[:, :, :, i] for i in range(3)]


def merge(o_BNHK: jax.Array, dtype: Any) -> jax.Array:
    """The heads' results of the calling module to [B, N, D]."""
    width = o_BNHK.shape[-2] * o_BNHK.shape[-1]
    y_BND = Dense(width, ("head", None, "embed"), dtype, name="out")(o_BNHK)
    return constrain(y_BND, "batch", "position", "width")


class AttentionLayer(nn.Module):
    """Multi-head softmax attention.

    Attributes:
      num_heads: H.
      causal: a position sees none after it.
      window: positions that one sees, itself included: if causal the last ones, else
        `window // 2` before and `(window - 1) // 2` after it. None is all.
    """

    num_heads: int
    causal: bool
    window: int | None
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; see `layers/mixers.py` for `position`."""
        q_BNHK, k_BNHK, v_BNHK = project(x_BND, self.num_heads, self.dtype)
        if position is not None:
            o_BNHK = self._step(q_BNHK, k_BNHK, v_BNHK, mask_BN, position)
            return merge(o_BNHK, self.dtype)
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "keys", k_BNHK)
            self.put_variable("cache", "values", v_BNHK)
            self.put_variable("cache", "valid", mask_BN)
        if self.window is None:
            o_BNHK = attention(q_BNHK, k_BNHK, v_BNHK, mask_BN, causal=self.causal)
        else:
            before, after = self.window // 2, (self.window - 1) // 2
            before, after = (before + after, 0) if self.causal else (before, after)
            o_BNHK = local_attention(q_BNHK, k_BNHK, v_BNHK, mask_BN, before=before, after=after)
        return merge(o_BNHK, self.dtype)

    def _step(
        self,
        q_B1HK: jax.Array,
        k_B1HK: jax.Array,
        v_B1HK: jax.Array,
        mask_B1: jax.Array,
        position: jax.Array,
    ) -> jax.Array:
        seen = []
        for name, x in (("keys", k_B1HK), ("values", v_B1HK), ("valid", mask_B1)):
            cache = self.get_variable("cache", name)
            cache = jax.lax.dynamic_update_slice_in_dim(cache, x, position, axis=1)
            self.put_variable("cache", name, cache)
            # Beyond the window, or at the beginning of what is not valid yet.
            count = min(self.window or cache.shape[1], cache.shape[1])
            start = jnp.maximum(position + 1 - count, 0)
            seen.append(jax.lax.dynamic_slice_in_dim(cache, start, count, axis=1))
        keys, values, valid = seen
        return attend(q_B1HK, keys, values, valid[:, None, None])


class LinearAttentionLayer(nn.Module):
    """Multi-head attention in linear time, with the features elu + 1."""

    num_heads: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, position: jax.Array | None = None
    ) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`; see `layers/mixers.py` for `position`."""
        q_BNHK, k_BNHK, v_BNHK = project(x_BND, self.num_heads, self.dtype)
        if position is None:
            o_BNHK, state_BHKV = linear_attention(
                q_BNHK, k_BNHK, v_BNHK, mask_BN, causal=self.causal
            )
        else:
            q_BHK, k_BHK, v_BHK = q_BNHK[:, 0], k_BNHK[:, 0], v_BNHK[:, 0]
            state_BHKV = self.get_variable("cache", "state")
            o_BHK, state_BHKV = linear_attention_step(q_BHK, k_BHK, v_BHK, state_BHKV)
            o_BNHK = o_BHK[:, None]
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "state", state_BHKV)
        return merge(o_BNHK, self.dtype)


class LinformerLayer(nn.Module):
    """Attention to learned combinations of positions (Wang et al. 2020, "Linformer").

    The projections of keys and of values are shared between heads; sequences shorter than
    `max_positions` use the first rows. A combination mixes all positions: never causal.

    Attributes:
      max_positions: N that the projections are made for.
      num_heads: H.
      rank: combinations.
    """

    max_positions: int
    num_heads: int
    rank: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, D] in `dtype`."""
        q_BNHK, k_BNHK, v_BNHK = project(x_BND, self.num_heads, self.dtype)
        k_BRHK = self._combine("key_combinations", k_BNHK, mask_BN)
        v_BRHK = self._combine("value_combinations", v_BNHK, mask_BN)
        return merge(attend(q_BNHK, k_BRHK, v_BRHK), self.dtype)

    def _combine(self, name: str, x_BNHK: jax.Array, mask_BN: jax.Array) -> jax.Array:
        init = partitioned(nn.initializers.lecun_normal(), None, None)
        kernel_NR = self.param(name, init, (self.max_positions, self.rank))
        kernel_NR = kernel_NR[: x_BNHK.shape[1]].astype(self.dtype)
        x_BNHK = jnp.where(mask_BN[..., None, None], x_BNHK, jnp.zeros((), self.dtype))
        y_BRHK = jnp.einsum("bnhk,nr->brhk", x_BNHK, kernel_NR)
        return constrain(y_BRHK, "batch", None, "head", None)
