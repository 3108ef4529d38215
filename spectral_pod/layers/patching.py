"""Bytes to patches: the byte-latent encoder, and sinusoidal position embeddings."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.fields import NonNegative, Positive
from spectral_pod.layers.dense import Dense, layer_norm
from spectral_pod.layers.parameter import parameter
from spectral_pod.ops.affine import affine
from spectral_pod.ops.gelu import gelu
from spectral_pod.ops.halo import previous
from spectral_pod.parallel.sharding import SEQUENCE, constrain, num_shards, shard_op
from spectral_pod.shapes import VOCAB_SIZE


@dataclasses.dataclass(frozen=True)
class Patches:
    """How the encoder reads bytes: the fields of `config.model.patch`.

    Attributes:
      stride: s, bytes of a patch. Bytes 4p .. 4p + 3 are patch p by default; with 1 each byte is a
        position of its own, as in published models.
      kernel: bytes that a patch sees, its own and those just before; 0 is s + 2.
      positions: sinusoidal embeddings of the patches' positions, or none.
    """

    stride: Positive = 4
    kernel: NonNegative = 0
    positions: Literal["sinusoidal", "none"] = "sinusoidal"

    @property
    def before(self) -> int:
        """How many bytes before its own a patch sees."""
        return (self.kernel or self.stride + 2) - self.stride

    @property
    def halo(self) -> int:
        """How many patches hold these."""
        return -(-self.before // self.stride)


class ByteConvolution(nn.Module):
    """A convolution of embedded bytes, computed as a sum of table rows, one per tap.

    As there are few byte values and many positions, the embedding table is multiplied by the kernel
    once, into a row per byte value and tap; each position then only sums rows.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, table_VE: jax.Array, ids_BNT: jax.Array) -> jax.Array:
        """[B, N, D] in `dtype` from the byte at every tap; id V is no byte and embeds to zero."""
        (V, E), T, D = table_VE.shape, ids_BNT.shape[2], self.features
        init, zeros = nn.initializers.lecun_normal((0, 1)), nn.initializers.zeros_init()
        kernel = parameter(init, "tap", "embed", None, group="decayed", inputs=2)
        kernel_TED = self.param("kernel", kernel, (T, E, D))
        bias_D = self.param("bias", parameter(zeros, None, group="undecayed"), (D,))
        # A kernel split over `embed` is gathered here, as in a Dense layer.
        kernel_TED = constrain(kernel_TED.astype(self.dtype), None, None, None)
        kernel_EM = jnp.swapaxes(kernel_TED, 0, 1).reshape(E, T * D)
        bias_M = jnp.pad(bias_D.astype(self.dtype), (0, (T - 1) * D))  # in one tap's rows only
        rows = affine(jnp.pad(table_VE, ((0, 1), (0, 0))), kernel_EM, bias_M)
        return _sum_rows(rows.reshape(V + 1, T, D), ids_BNT)


@jax.custom_vjp
def _sum_rows(rows_VTD: jax.Array, ids_BNT: jax.Array) -> jax.Array:
    """`sum_t rows[ids[:, :, t], t]`, [B, N, D], summed in float32."""
    taps = range(ids_BNT.shape[2])
    found = [rows_VTD[:, t][ids_BNT[:, :, t]].astype(jnp.float32) for t in taps]
    return functools.reduce(jnp.add, found).astype(rows_VTD.dtype)


def _sum_rows_forward(
    rows_VTD: jax.Array, ids_BNT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum_rows(rows_VTD, ids_BNT), (rows_VTD[..., :0], ids_BNT)


def _sum_rows_backward(
    residuals: tuple[jax.Array, jax.Array], dy_BND: jax.Array
) -> tuple[jax.Array, None]:
    """A matrix product with one-hot ids, for so few rows faster than a scatter-add."""
    like_VTD, ids_BNT = residuals
    ids_TBN = jnp.moveaxis(ids_BNT, 2, 0)
    one_hot_VTBN = jnp.arange(len(like_VTD))[:, None, None, None] == ids_TBN[None]
    drows_VTD = jnp.tensordot(
        one_hot_VTBN.astype(dy_BND.dtype), dy_BND, 2, preferred_element_type=jnp.float32
    )
    return drows_VTD.astype(dy_BND.dtype), None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


class ByteLatentEncoder(nn.Module):
    """Embed -> strided convolution -> Dense + GELU -> LayerNorm: [B, L] bytes to [B, L/s, D]."""

    patches: Patches
    hidden_dim: int
    embed_dim: int
    dtype: Any

    @nn.compact
    def __call__(
        self, tokens_BL: jax.Array, mask_BL: jax.Array, before_BH: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the patches [B, N, D] in `dtype`, their validity [B, N], and `before_BH`.

        A patch is valid if any of its own bytes is; padding bytes embed to zero. `before_BH` are
        the last bytes of the chunk before this one, as the call for that chunk returned them.

        Raises:
          ValueError: L is not a multiple of the stride.
        """
        (B, L), stride = tokens_BL.shape, self.patches.stride
        if L % stride:
            raise ValueError(f"sequence length {L} is not a multiple of the patch stride {stride}")
        tokens_BL, mask_BL = (constrain(x, "batch", "position") for x in (tokens_BL, mask_BL))
        table_VE = self.param(
            "embedding",
            parameter(nn.initializers.normal(1.0), "vocab", "embed", group="decayed"),
            (VOCAB_SIZE, self.embed_dim),
        )
        table_VE = constrain(table_VE.astype(self.dtype), None, None)
        ids_BL = jnp.where(mask_BL, tokens_BL, VOCAB_SIZE)
        of_device = functools.partial(_windows, patches=self.patches)
        sequence = ("batch", "position")
        windows = shard_op(of_device, [sequence, ("batch", None)], (*sequence, None))
        # Counted down from VOCAB_SIZE, so that 0 is no byte.
        halo = self.patches.halo * stride
        last_BH = VOCAB_SIZE - ids_BL[:, L - halo :]
        before_BH = jnp.zeros((B, halo), ids_BL.dtype) if before_BH is None else before_BH
        convolution = ByteConvolution(self.hidden_dim, self.dtype, name="convolution")
        x_BND = convolution(table_VE, windows(ids_BL, before_BH))
        x_BND = constrain(x_BND, "batch", "position", None)
        x_BND = Dense(self.hidden_dim, ("embed", None), self.dtype, name="project")(x_BND)
        x_BND = layer_norm(gelu(x_BND), "norm").astype(self.dtype)
        mask_BN = mask_BL.reshape(B, L // stride, stride).any(axis=-1)
        return constrain(x_BND, "batch", "position", "width"), mask_BN, last_BH


def _windows(ids_BL: jax.Array, before_BH: jax.Array, patches: Patches) -> jax.Array:
    """The bytes that each patch sees, its own last: [B, N, T].

    Args:
      ids_BL: this device's bytes.
      before_BH: `VOCAB_SIZE - id` of those before the first device's; 0 for none.
      patches: stride and kernel.
    """
    (B, L), stride, halo = ids_BL.shape, patches.stride, patches.halo
    first_BH = previous(VOCAB_SIZE - ids_BL, halo * stride)  # zeros on the first device
    if num_shards("position") > 1:
        before_BH = jnp.where(jax.lax.axis_index(SEQUENCE) == 0, before_BH, 0)
    first_BH += before_BH
    own_BPT = jnp.concatenate([VOCAB_SIZE - first_BH, ids_BL], axis=1).reshape(B, -1, stride)
    shifted = [own_BPT[:, i : i + L // stride] for i in range(halo + 1)]
    return jnp.concatenate(shifted, axis=2)[:, :, halo * stride - patches.before :]


def sinusoidal_positions(
    length: int, width: int, dtype: Any, start: jax.Array | int = 0
) -> jax.Array:
    """[1, N, D]: sines in the first half of D, cosines in the second (Vaswani et al. 2017).

    The first position is the one with the number `start`.
    """
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    place_N = (start + jnp.arange(length)).astype(jnp.float32)
    angles = place_N[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[None, :, :width].astype(
        dtype
    )
