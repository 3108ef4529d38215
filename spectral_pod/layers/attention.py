"""Attention mixers: over all positions, over a window, in linear time, and of low rank."""

from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.fields import Positive
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.dense import Dense
from spectral_pod.layers.mixer import GrowingState, Mixer
from spectral_pod.layers.parameter import parameter
from spectral_pod.ops.attention import attend, attention, local_attention, resolve
from spectral_pod.ops.choice import Choice
from spectral_pod.ops.linear_attention import linear_attention, linear_attention_step
from spectral_pod.parallel.sharding import constrain


class _MultiHead(Mixer):
    """The projections of multi-head attention: to queries, keys and values, and from the heads.

    Attributes:
      num_heads: H, which must divide the width.
    """

    num_heads: Positive = 4

    # A softmax over keys does not change if all keys move alike: a bias would get a gradient of
    # rounding errors only, which Adam scales up until runs on different meshes differ.
    has_key_bias: ClassVar[bool] = True

    section = "attention"
    divisible = (
        ("model.hidden_dim", "model.attention.num_heads"),
        ("model.attention.num_heads", "mesh.tensor"),
    )

    def setup(self) -> None:
        # The head axis is first, so that it stays split where Dense makes the kernel a matrix.
        features, axes = (self.num_heads, 3, self.head_dim), ("embed", "head", None, None)
        self.query_key_value = Dense(features, axes, self.dtype, use_bias=self.has_key_bias)
        if not self.has_key_bias:
            zeros = parameter(nn.initializers.zeros_init(), "head", None, None, group="undecayed")
            shape = (self.num_heads, 2, self.head_dim)
            self.query_value_bias = self.param("query_value_bias", zeros, shape)
        self.out = Dense(self.width, ("head", None, "embed"), self.dtype)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def project(self, x_BND: jax.Array) -> list[jax.Array]:
        """[B, N, D] to queries, keys and values, each [B, N, H, K] in `dtype` with H K = D."""
        qkv_BNH3K = self.query_key_value(x_BND)
        qkv_BNH3K = constrain(qkv_BNH3K, "batch", "position", "head", None, None)
        q_BNHK, k_BNHK, v_BNHK = (qkv_BNH3K[:, :, :, i] for i in range(3))
        if not self.has_key_bias:
            bias_H2K = self.query_value_bias.astype(self.dtype)
            q_BNHK += bias_H2K[None, None, :, 0]
            v_BNHK += bias_H2K[None, None, :, 1]
        return [q_BNHK, k_BNHK, v_BNHK]

    def merge(self, o_BNHK: jax.Array) -> jax.Array:
        """Projects the heads' outputs to [B, N, D] in `dtype`."""
        return constrain(self.out(o_BNHK), "batch", "position", "width")


class KeyValues(GrowingState):
    """The key-value cache: positions up to now and, after `extend`, space for later ones."""

    keys_BNHK: jax.Array
    values_BNHK: jax.Array
    valid_BN: jax.Array

    def extend(self, capacity: int) -> "KeyValues":
        def padded(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, capacity - x.shape[1] if i == 1 else 0) for i in range(x.ndim)])

        return jax.tree.map(padded, self)


class _SoftmaxAttention(_MultiHead):
    """What softmax attention has in common over all positions and over a window."""

    has_key_bias = False

    @property
    def reach(self) -> int | None:
        """The number of positions that a query sees, its own included; None means all."""
        return None

    def init_state(self, batch: int) -> KeyValues:
        none_B0HK = jnp.zeros((batch, 0, self.num_heads, self.head_dim), self.dtype)
        return KeyValues(none_B0HK, none_B0HK, jnp.zeros((batch, 0), bool))

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, KeyValues]:
        q_BPHK, k_BPHK, v_BPHK = self.project(x_BPD)
        y_BPD = self.merge(self._attend(q_BPHK, k_BPHK, v_BPHK, mask_BP))
        return y_BPD, KeyValues(k_BPHK, v_BPHK, mask_BP)

    def advance(
        self, x_B1D: jax.Array, state: KeyValues, position: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        q_B1HK, k_B1HK, v_B1HK = self.project(x_B1D)
        new = KeyValues(k_B1HK, v_B1HK, jnp.ones(x_B1D.shape[:2], bool))

        def write(x: jax.Array, x_new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, x_new, position, axis=1)

        state = jax.tree.map(write, state, new)
        # The window ends at `position`. Near the start it reaches later positions, not valid yet.
        capacity = state.valid_BN.shape[1]
        count = min(self.reach or capacity, capacity)
        start = jnp.maximum(position + 1 - count, 0)

        def read(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)

        seen = jax.tree.map(read, state)
        valid_B11S = seen.valid_BN[:, None, None]
        return self.merge(attend(q_B1HK, seen.keys_BNHK, seen.values_BNHK, valid_B11S)), state

    def _attend(
        self, q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, mask_BN: jax.Array
    ) -> jax.Array:
        raise NotImplementedError


class AttentionLayer(_SoftmaxAttention):
    """Multi-head softmax attention.

    Attributes:
      method: how whole sequences are computed, see `ops/attention.py`.
    """

    method: Literal["auto", "plain", "blocked", "fused"] = "auto"

    definition = (("model.attention.method", "plain"),)

    @classmethod
    def methods(cls, config: Architecture, batch: int) -> dict[str, Choice]:
        head_dim = config.hidden_dim // config.option("attention.num_heads")
        method, length = config.option("attention.method"), config.max_positions
        return {"attention": resolve(method, length, head_dim, config.dtype)}

    def _attend(
        self, q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, mask_BN: jax.Array
    ) -> jax.Array:
        return attention(q_BNHK, k_BNHK, v_BNHK, mask_BN, causal=self.causal, method=self.method)


class LocalAttentionLayer(_SoftmaxAttention):
    """Multi-head softmax attention over a window.

    Attributes:
      window: the number of positions that a query sees, its own included: if causal the preceding
        ones, otherwise `window // 2` before and `(window - 1) // 2` after it.
    """

    window: Positive = 128

    @classmethod
    def halo(cls, config: Architecture) -> int:
        return config.option("attention.window") - 1

    @property
    def reach(self) -> int:
        return self.window

    def _attend(
        self, q_BNHK: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, mask_BN: jax.Array
    ) -> jax.Array:
        before, after = self.window // 2, (self.window - 1) // 2
        before, after = (before + after, 0) if self.causal else (before, after)
        return local_attention(q_BNHK, k_BNHK, v_BNHK, mask_BN, before=before, after=after)


class LinearAttentionLayer(_MultiHead):
    """Multi-head linear attention with the feature map elu + 1 (Katharopoulos et al. 2020).

    The decode state is S of `ops/linear_attention.py`, float32 [B, H, K, K + 1].
    """

    def init_state(self, batch: int) -> jax.Array:
        shape = (batch, self.num_heads, self.head_dim, self.head_dim + 1)
        return jnp.zeros(shape, jnp.float32)

    def prefill(self, x_BPD: jax.Array, mask_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BPHK, k_BPHK, v_BPHK = self.project(x_BPD)
        o_BPHK, state_BHKV = linear_attention(q_BPHK, k_BPHK, v_BPHK, mask_BP, causal=self.causal)
        return self.merge(o_BPHK), state_BHKV

    def advance(
        self, x_B1D: jax.Array, state_BHKV: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        q_BHK, k_BHK, v_BHK = (x_B1HK[:, 0] for x_B1HK in self.project(x_B1D))
        o_BHK, state_BHKV = linear_attention_step(q_BHK, k_BHK, v_BHK, state_BHKV)
        return self.merge(o_BHK[:, None]), state_BHKV


class LinformerLayer(_MultiHead):
    """Attention to learned combinations of positions (Wang et al. 2020, "Linformer").

    The combinations are shared by all heads, but differ for keys and values; sequences shorter than
    `max_positions` use the first rows. As they mix all positions, the layer cannot be causal.

    Attributes:
      rank: R, the number of combinations.
    """

    rank: Positive = 64

    can_be_causal = False

    def setup(self) -> None:
        super().setup()
        init = parameter(nn.initializers.lecun_normal(), None, None, group="decayed", inputs=1)
        shape = (self.max_positions, self.rank)
        self.combine_keys = self.param("key_combinations", init, shape)
        self.combine_values = self.param("value_combinations", init, shape)

    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        q_BNHK, k_BNHK, v_BNHK = self.project(x_BND)
        k_BRHK = self._combine(self.combine_keys, k_BNHK, mask_BN)
        v_BRHK = self._combine(self.combine_values, v_BNHK, mask_BN)
        return self.merge(attend(q_BNHK, k_BRHK, v_BRHK))

    def _combine(self, kernel_NR: jax.Array, x_BNHK: jax.Array, mask_BN: jax.Array) -> jax.Array:
        kernel_NR = kernel_NR[: x_BNHK.shape[1]].astype(self.dtype)
        x_BNHK = jnp.where(mask_BN[..., None, None], x_BNHK, jnp.zeros((), self.dtype))
        y_BRHK = jnp.einsum("bnhk,nr->brhk", x_BNHK, kernel_NR)
        return constrain(y_BRHK, "batch", None, "head", None)
