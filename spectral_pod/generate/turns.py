"""Decoding of sequences that a model and others write by turns, in one batch, and still exactly.

At each position a row reads either the symbol that it is given or the one that the model wrote
itself. Decoding halts, wherever in a block that is, when a row has written the symbol that hands
over; what it is given then is read from the state as it is, and nothing is read twice.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.generate.decode import Decoder, read_position
from spectral_pod.generate.sampling import Sampling, draw
from spectral_pod.models.causal_model import CausalModel, DecodeState
from spectral_pod.ops.online_conv import BLOCK
from spectral_pod.shapes import PAD

_OWN = -1  # in place of a given symbol: the row reads what it wrote


class Grammar(NamedTuple):
    """What a model may write, as arrays.

    Attributes:
      symbol_C: int32, the symbol that each class is.
      allowed_VC: bool, the classes that may follow each symbol.
      halt: int32, the class that hands over.
    """

    symbol_C: np.ndarray
    allowed_VC: np.ndarray
    halt: np.int32


class Heard(NamedTuple):
    """What became of a row: how many of the given symbols it read, and what it wrote then."""

    read: int
    written: list[int]


class _Last(NamedTuple):
    """Of the last position that was read."""

    logits_BC: jax.Array  # after it
    class_B: jax.Array  # sampled from them


class TurnDecoder(Decoder):
    """Continues one batch of sequences by turns.

    `logits_BC` are the float32 logits after the last position that was read.
    """

    def __init__(
        self,
        model: CausalModel,
        params: Any,
        tokens_BP: np.ndarray,
        *,
        num_positions: int,
        keys_B: jax.Array,
        sampling: Sampling,
        grammar: Grammar,
    ):
        """Prefills prompts; the first call of `go_on` must give each row a symbol.

        Args:
          model, params, tokens_BP, num_positions: as of `Decoder`; P is at least `BLOCK`.
          keys_B: random keys. What a row writes depends on its key and its own symbols only.
          sampling: temperature, top-k and top-p.
          grammar: what the model may write.
        """
        super().__init__(model, params, tokens_BP, num_positions=num_positions)
        self._keys_B, self._sampling, self._grammar = keys_B, sampling, grammar
        self._padding_B = jnp.asarray((tokens_BP == PAD).sum(axis=1), jnp.int32)
        assert self.logits_BC is not None
        self._last = _Last(self.logits_BC, jnp.zeros(len(tokens_BP), jnp.int32))
        self._phase = 0  # positions of the block that have been read

    @property
    def room(self) -> int:
        """The number of positions that can still be read."""
        return self._capacity - self.position - self._phase

    def go_on(self, given: Sequence[Sequence[int]], live: Sequence[bool]) -> list[Heard]:
        """Reads positions until a live row has written the symbol that hands over, at most `BLOCK`.

        Args:
          given: the symbols that each row reads next; where they end, it goes on with its own.
          live: the rows that count. Others read whatever they write, which is to be ignored.

        Returns:
          Of each row how many given symbols it read, and what it wrote. The last symbol it wrote
          has not been read: it is the first of the next call, unless other symbols are given.
        """
        given_BT = np.full((len(given), BLOCK + 1), _OWN, np.int32)
        for row, symbols in enumerate(given):
            head = symbols[: BLOCK + 1]
            given_BT[row, : len(head)] = head
        left = min(BLOCK - self._phase, self.room)
        self._last, self._state, written_BT, count = _read_by_turns(
            self._model, self._sampling, self._params, self._last, self._state, given_BT,
            np.asarray(live, bool), self._keys_B, self._padding_B, self.position + self._phase,
            left, self._grammar,
        )  # fmt: skip
        self.logits_BC, num_read = self._last.logits_BC, int(count)
        self._phase += num_read
        if self._phase == BLOCK:
            self._phase = 0
            self._advance()
        written = np.asarray(written_BT)[:, :num_read]
        return [
            Heard(min(num_read, len(symbols)), row[row != _OWN].tolist())
            for symbols, row in zip(given, written)
        ]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _read_by_turns(
    model: CausalModel,
    sampling: Sampling,
    params: Any,
    last: _Last,
    state: DecodeState,
    given_BT: jax.Array,
    live_B: jax.Array,
    keys_B: jax.Array,
    padding_B: jax.Array,
    position: jax.Array,
    left: jax.Array,
    grammar: Grammar,
) -> tuple[_Last, DecodeState, jax.Array, jax.Array]:
    symbol_C, allowed_VC = jnp.asarray(grammar.symbol_C), jnp.asarray(grammar.allowed_VC)

    def is_to_go_on(carry: Any) -> jax.Array:
        _, _, _, i, is_halted = carry
        return (i < left) & ~is_halted

    def step(carry: Any) -> Any:
        last, state, written_BT, i, _ = carry
        given_B, next_B = given_BT[:, i], given_BT[:, i + 1]
        token_B = jnp.where(given_B == _OWN, symbol_C[last.class_B], given_B)
        logits_BC, state = read_position(model, params, state, token_B, position + i)
        # Of the symbols that the row has read, this is the n-th.
        n_B = position + i + 1 - padding_B
        masked_BC = jnp.where(allowed_VC[token_B], logits_BC, -jnp.inf)
        class_B = draw(masked_BC, jax.vmap(jax.random.fold_in)(keys_B, n_B), sampling)
        is_own_B = next_B == _OWN
        written_B = jnp.where(is_own_B, symbol_C[class_B], _OWN)
        is_halted = jnp.any(live_B & is_own_B & (class_B == grammar.halt))
        return (
            _Last(logits_BC, class_B),
            state,
            written_BT.at[:, i].set(written_B),
            i + 1,
            is_halted,
        )

    written_BT = jnp.full((given_BT.shape[0], BLOCK), _OWN, jnp.int32)
    start = last, state, written_BT, jnp.int32(0), jnp.bool_(False)
    last, state, written_BT, count, _ = jax.lax.while_loop(is_to_go_on, step, start)
    return last, state, written_BT, count


def aligned(rows: Sequence[Sequence[int]], num_rows: int) -> np.ndarray:
    """Left-padded prompts, int32 [num_rows, P]; P is a power of two, to compile for few shapes."""
    longest = max(len(symbols) for symbols in rows)
    length = max(BLOCK, 1 << (longest - 1).bit_length())
    tokens_BP = np.full((num_rows, length), PAD, np.int32)
    tokens_BP[len(rows) :, -1] = 0  # rows without a prompt, which are ignored
    for row, symbols in enumerate(rows):
        tokens_BP[row, length - len(symbols) :] = symbols
    return tokens_BP
