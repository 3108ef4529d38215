"""The base of the causal models: bytes -> embeddings -> causal blocks -> the next byte."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectral_pod.layers.block import all_blocks, separate_blocks
from spectral_pod.layers.dense import Dense, layer_norm
from spectral_pod.layers.dropout import Dropout
from spectral_pod.layers.embedding import Embedding, HarmonicEmbedding
from spectral_pod.layers.mixer import State
from spectral_pod.layers.parameter import parameter
from spectral_pod.layers.probes import probe, valid_rms
from spectral_pod.models.model import Model
from spectral_pod.parallel.sharding import constrain
from spectral_pod.shapes import Positions, SequenceLogits, TokenMask, Tokens


class DecodeState(NamedTuple):
    """The decode state of a causal model.

    Attributes:
      count_B1: int32, the number of valid positions so far; None without learned positions.
      layers: the state of every layer (`layers/block.py`).
    """

    count_B1: jax.Array | None
    layers: tuple[State, ...]


class CausalModel(Model):
    """A model whose logits at a position depend on the tokens up to it, and on no later one.

    A language model has 257 classes: the byte values, and last the end of a document.
    """

    causal: ClassVar[bool] = True

    @nn.compact
    def __call__(
        self, tokens_BL: Tokens, mask_BL: TokenMask, train: bool = False
    ) -> SequenceLogits:
        """int tokens and their validity, [B, L], to float32 logits [B, L, C].

        Invalid positions, before or after the valid ones, do not affect valid ones. Dropout uses
        the rng `dropout`. Auxiliary losses, [B] each, are sown into the collection `losses`.
        """
        return self._read(tokens_BL, mask_BL, train)[0]

    @nn.compact
    def extend(
        self, tokens_BL: Tokens, mask_BL: TokenMask, carry: Any, train: bool = False
    ) -> tuple[SequenceLogits, Any]:
        """As a call, for the next chunk of longer sequences; see `models/chunks.py`."""
        return self._read(tokens_BL, mask_BL, train, carry, chunked=True)

    def _read(
        self,
        tokens_BL: Tokens,
        mask_BL: TokenMask,
        train: bool,
        carry: Any = None,
        chunked: bool = False,
    ) -> tuple[SequenceLogits, Any]:
        config = self.config
        tokens_BL, mask_BL = (constrain(x, "batch", "position") for x in (tokens_BL, mask_BL))
        embedded_BND = self._embed(tokens_BL)
        x_BND = embedded_BND
        if config.positions == "learned":
            x_BND = self._with_positions(x_BND, jnp.cumsum(mask_BL, axis=1))
        x_BND = self._masked(x_BND, mask_BL)
        x_BND = Dropout(config.dropout, deterministic=not train)(x_BND)
        probe(self, "input_rms", lambda: valid_rms(x_BND, mask_BL))
        x_BND, carry = all_blocks(config, x_BND, mask_BL, train, carry, chunked)
        x_BND = layer_norm(x_BND, "norm")
        if train:
            self.sow_losses(x_BND, embedded_BND, mask_BL)
        return self._logits(x_BND), carry

    @nn.compact
    def init_state(self, batch: int) -> DecodeState:
        """The state of `batch` sequences before their first position; needs `config.decoding`."""
        learned = self.config.positions == "learned"
        count_B1 = jnp.zeros((batch, 1), jnp.int32) if learned else None
        layers = separate_blocks(self.config)
        return DecodeState(count_B1, tuple(block.init_state(batch) for block in layers))

    @nn.compact
    def prefill(self, tokens_BP: Tokens, mask_BP: TokenMask) -> tuple[SequenceLogits, DecodeState]:
        """Reads left-padded prompts; needs `config.decoding`.

        Returns:
          float32 logits [B, P, C] and the state after the prompts, from which the decoder continues
          (`generate/decode.py`).
        """
        x_BPD, count_B1 = self._embed(tokens_BP), None
        if self.config.positions == "learned":
            count_BP = jnp.cumsum(mask_BP, axis=1)
            x_BPD, count_B1 = self._with_positions(x_BPD, count_BP), count_BP[:, -1:]
        x_BPD, layers = self._masked(x_BPD, mask_BP), []
        for block in separate_blocks(self.config):
            x_BPD, state = block.prefill(x_BPD, mask_BP)
            layers.append(state)
        return self._logits(layer_norm(x_BPD, "norm")), DecodeState(count_B1, tuple(layers))

    @nn.compact
    def advance(
        self, tokens_B1: Tokens, state: DecodeState, position: jax.Array
    ) -> tuple[SequenceLogits, DecodeState]:
        """Reads one more token per sequence; needs `config.decoding`.

        Args:
          tokens_B1: int32, the tokens at `position`.
          state: the state of all earlier positions.
          position: int32 scalar, counted from the start of the padded prompts.

        Returns:
          float32 logits [B, 1, C] and the new state.
        """
        x_B1D, count_B1 = self._embed(tokens_B1), state.count_B1
        if count_B1 is not None:
            x_B1D = x_B1D + self._position_table()[count_B1]
            count_B1 = count_B1 + 1
        x_B1D, layers = constrain(x_B1D, "batch", "position", "width"), []
        for block, before in zip(separate_blocks(self.config), state.layers):
            x_B1D, after = block.advance(x_B1D, before, position)
            layers.append(after)
        return self._logits(layer_norm(x_B1D, "norm")), DecodeState(count_B1, tuple(layers))

    def sow_losses(self, x_BND: Positions, embedded_BND: Positions, mask_BN: TokenMask) -> None:
        """Sows auxiliary losses; by default there are none."""

    def _embed(self, tokens_BL: Tokens) -> jax.Array:
        return self.make_embedding()(tokens_BL)

    def make_embedding(self) -> Embedding | HarmonicEmbedding:
        """The module `embedding`, which maps tokens to vectors."""
        config = self.config
        sizes = config.vocab_size, config.hidden_dim
        return Embedding(*sizes, config.activation_dtype, name="embedding")

    def _with_positions(self, x_BND: jax.Array, count_BN: jax.Array) -> jax.Array:
        """Adds the embeddings of positions, which are counted from the first valid one of a row.

        Args:
          x_BND: the embedded tokens.
          count_BN: the number of valid positions up to each one, its own included.
        """
        table_ND, N = self._position_table(), x_BND.shape[1]

        def by_place() -> jax.Array:
            return x_BND + constrain(table_ND[None, :N], None, "position", None)

        def by_count() -> jax.Array:
            return x_BND + table_ND[jnp.maximum(count_BN - 1, 0)]

        if len(table_ND) < N:  # a prompt that is padded beyond the context
            return by_count()
        # Nothing precedes the valid positions of a batch in training. They are numbered by their
        # place then, which takes no lookup, and in the backward pass a sum instead of a scatter.
        place_N = jnp.arange(1, N + 1, dtype=count_BN.dtype)
        is_prefix = jnp.all((count_BN == place_N[None]) | (count_BN == count_BN[:, -1:]))
        return jax.lax.cond(is_prefix, by_place, by_count)

    def _position_table(self) -> jax.Array:
        """[N, D] in the model's dtype."""
        init = parameter(nn.initializers.normal(0.1), None, "embed", group="decayed")
        shape = (self.config.max_positions, self.config.hidden_dim)
        table_ND = self.param("position_embedding", init, shape)
        return constrain(table_ND.astype(self.config.activation_dtype), None, None)

    def _masked(self, x_BND: jax.Array, mask_BN: jax.Array) -> jax.Array:
        zero = jnp.zeros((), self.config.activation_dtype)
        x_BND = jnp.where(mask_BN[..., None], x_BND, zero)
        return constrain(x_BND, "batch", "position", "width")

    def _logits(self, x_BND: jax.Array) -> jax.Array:
        dtype = self.config.activation_dtype
        head = Dense(self.num_classes, ("embed", "class"), dtype, name="head")
        logits_BNC = head(x_BND.astype(dtype)).astype(jnp.float32)
        return constrain(logits_BNC, "batch", "position", None)
