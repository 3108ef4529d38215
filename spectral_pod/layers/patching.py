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
from spectral_pod.parallel.sharding import SEQUENCE, constrain, num_shards, platform, shard_op
from spectral_pod.shapes import VOCAB_SIZE

LONGEST_NGRAM = 32


@dataclasses.dataclass(frozen=True)
class Patches:
    """How the encoder reads bytes: the fields of `config.model.patch`.

    Attributes:
      stride: s, bytes of a patch. Bytes 4p .. 4p + 3 are patch p by default; with 1 each byte is a
        position of its own, as in published models.
      kernel: bytes that the convolution of a patch sees, its own and those just before; 0 is s + 2.
      positions: sinusoidal embeddings of the patches' positions, or none.
      ngrams: numbers of bytes n, up to `LONGEST_NGRAM`; for each, every n successive bytes are
        embedded as one, see `NgramEmbeddings`.
      ngram_rows: rows of the table for each n.
    """

    stride: Positive = 4
    kernel: NonNegative = 0
    positions: Literal["sinusoidal", "none"] = "sinusoidal"
    ngrams: tuple[int, ...] = ()
    ngram_rows: Positive = 32_768

    @property
    def taps(self) -> int:
        """How many bytes the convolution of a patch sees."""
        return self.kernel or self.stride + 2

    @property
    def before(self) -> int:
        """How many bytes before its own a patch sees."""
        return max(self.taps - self.stride, max(self.ngrams, default=1) - 1)

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
    """A matrix product with one-hot ids, for so few rows faster than a scatter-add.

    On CPUs tap by tap, as the one-hot ids of all would be the largest array of a step.
    """
    like_VTD, ids_BNT = residuals

    def of_tap(ids_BN: jax.Array) -> jax.Array:
        one_hot_VBN = jnp.arange(len(like_VTD))[:, None, None] == ids_BN[None]
        one_hot_VBN = one_hot_VBN.astype(dy_BND.dtype)
        return jnp.tensordot(one_hot_VBN, dy_BND, 2, preferred_element_type=jnp.float32)

    ids_TBN = jnp.moveaxis(ids_BNT, 2, 0)
    by_tap = platform() == "cpu"
    drows_TVD = jax.lax.map(of_tap, ids_TBN) if by_tap else jax.vmap(of_tap)(ids_TBN)
    return jnp.swapaxes(drows_TVD, 0, 1).astype(dy_BND.dtype), None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


class NgramEmbeddings(nn.Module):
    """Embeddings of n-grams of bytes, found by a hash of their bytes (Pagnoni et al. 2024, "Byte
    Latent Transformer": hash n-gram embeddings), and summed over those that end in a patch.

    Different n-grams with one hash share a row. The first n-grams of a document begin before it.
    """

    patches: Patches
    embed_dim: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, ids_BNT: jax.Array) -> jax.Array:
        """[B, N, D] in `dtype` from the bytes that each patch sees; id V is no byte."""
        patches = self.patches
        rows, stride = patches.ngram_rows, patches.stride
        # Their sum has unit variance.
        init = nn.initializers.normal((stride * len(patches.ngrams)) ** -0.5)
        table_RE = self.param(
            "embedding",
            parameter(init, "vocab", "embed", group="decayed"),
            (rows * len(patches.ngrams), self.embed_dim),
        )
        table_RE = constrain(table_RE.astype(self.dtype), None, None)

        def summed(table_RE: jax.Array, ids_BNT: jax.Array) -> jax.Array:
            total = jnp.zeros((*ids_BNT.shape[:2], table_RE.shape[1]), jnp.float32)
            for i, n in enumerate(patches.ngrams):
                for last in range(ids_BNT.shape[2] - stride, ids_BNT.shape[2]):
                    hash_BN = _hash(ids_BNT[:, :, last + 1 - n : last + 1])
                    row_BN = rows * i + (hash_BN % rows).astype(jnp.int32)
                    is_byte_BN1 = ids_BNT[:, :, last, None] < VOCAB_SIZE
                    total += jnp.where(is_byte_BN1, table_RE[row_BN].astype(jnp.float32), 0.0)
            return total

        sequence = ("batch", "position", None)
        # Under XLA's own partitioning the scattered gradients of all rows would be gathered.
        embed = shard_op(summed, [(None, None), sequence], sequence)
        x_BNE = constrain(embed(table_RE, ids_BNT), "batch", "position", None).astype(self.dtype)
        return Dense(self.features, ("embed", None), self.dtype, name="project")(x_BNE)


def _hash(ids: jax.Array) -> jax.Array:
    """uint32: a hash of the ids along the last axis, FNV-1a with the last steps of MurmurHash3."""
    found = jnp.full(ids.shape[:-1], 2_166_136_261, jnp.uint32)
    for i in range(ids.shape[-1]):
        found = (found ^ ids[..., i].astype(jnp.uint32)) * jnp.uint32(16_777_619)
    found = (found ^ (found >> 16)) * jnp.uint32(0x85EBCA6B)
    found = (found ^ (found >> 13)) * jnp.uint32(0xC2B2AE35)
    return found ^ (found >> 16)


class ByteLatentEncoder(nn.Module):
    """Embed -> strided convolution -> Dense + GELU -> LayerNorm: [B, L] bytes to [B, L/s, D].

    The embeddings of n-grams, if any, are added to the convolution's output.
    """

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
        ids_BNT = windows(ids_BL, before_BH)
        convolution = ByteConvolution(self.hidden_dim, self.dtype, name="convolution")
        x_BND = convolution(table_VE, ids_BNT[:, :, -self.patches.taps :])
        if self.patches.ngrams:
            sizes = self.patches, self.embed_dim, self.hidden_dim, self.dtype
            x_BND += NgramEmbeddings(*sizes, name="ngrams")(ids_BNT)
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
