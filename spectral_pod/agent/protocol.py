"""Conversations of a user, a model and its tools, as symbols that a model reads and writes.

A conversation is a row of turns. Each is the symbol of its role, bytes, and END:

    USER what is 12*34? END  CALL calculator {"expression": "12*34"} END  RESULT 408 END
    ANSWER 408 END

These symbols are above 255 and bytes are below, so nothing in a turn can begin or end one: whatever
a user writes, a document holds or a tool prints stays text.

A model writes thoughts, calls and answers. Its classes are the bytes and, after them, END, THOUGHT,
CALL and ANSWER. There is no class for USER and RESULT: it cannot write what others say.

Which role may follow which:

    user                -> thought, call, answer        call    -> result
    thought, result     -> thought, call, answer        answer  -> user
"""

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from spectral_pod.errors import DataError
from spectral_pod.shapes import ANSWER, CALL, END, RESULT, THOUGHT, USER

VOCAB_SIZE = RESULT + 1  # rows of the embedding of a model of conversations
NUM_CLASSES = 256 + 4
NOT_SCORED = -1  # the label of what the model does not write

# The symbol of each class: int32 [NUM_CLASSES].
SYMBOL_OF_CLASS = np.asarray([*range(256), END, THOUGHT, CALL, ANSWER], np.int32)


class Role(enum.StrEnum):
    """Who speaks in a turn, or, of the model, to whom."""

    USER = "user"
    THOUGHT = "thought"
    CALL = "call"
    RESULT = "result"
    ANSWER = "answer"


SYMBOL = {
    Role.USER: USER,
    Role.THOUGHT: THOUGHT,
    Role.CALL: CALL,
    Role.RESULT: RESULT,
    Role.ANSWER: ANSWER,
}
_ROLE = {symbol: role for role, symbol in SYMBOL.items()}
WRITTEN = frozenset({Role.THOUGHT, Role.CALL, Role.ANSWER})  # by the model
FOLLOWS: dict[Role | None, frozenset[Role]] = {
    None: frozenset({Role.USER}),
    Role.USER: WRITTEN,
    Role.THOUGHT: WRITTEN,
    Role.RESULT: WRITTEN,
    Role.CALL: frozenset({Role.RESULT}),
    Role.ANSWER: frozenset({Role.USER}),
}


class Turn(NamedTuple):
    """A turn; one without an end was cut off, and is the last of its conversation."""

    role: Role
    data: bytes
    ended: bool = True


def symbols_of(turn: Turn) -> list[int]:
    """The symbols of a turn."""
    return [SYMBOL[turn.role], *turn.data, *([END] if turn.ended else [])]


def encode(turns: Iterable[Turn]) -> np.ndarray:
    """The symbols of a conversation, int32 [n].

    Raises:
      DataError: a turn follows one that it cannot follow.
    """
    turns = list(turns)
    check(turns)
    return np.asarray([symbol for turn in turns for symbol in symbols_of(turn)], np.int32)


def check(turns: Sequence[Turn]) -> None:
    """Raises a DataError if a turn cannot follow the one before it, or follows one that was cut."""
    before: Turn | None = None
    for number, turn in enumerate(turns, 1):
        if before is not None and not before.ended:
            raise DataError(f"turn {number} follows a turn without an end")
        role = before.role if before else None
        if turn.role not in FOLLOWS[role]:
            after = f"after a turn {role.value!r}" if role else "at the beginning"
            raise DataError(
                f"turn {number} is {turn.role.value!r}; {after} there can only be "
                + " or ".join(sorted(repr(one.value) for one in FOLLOWS[role]))
            )
        before = turn


def decode(symbols: Iterable[int]) -> list[Turn]:
    """The turns of a conversation; the inverse of `encode`.

    Raises:
      DataError: these symbols are no turns, or a turn cannot follow the one before it.
    """
    turns: list[Turn] = []
    data: bytearray | None = None  # of the turn that has begun
    for place, symbol in enumerate(map(int, symbols)):
        if data is None and symbol in _ROLE:
            data = bytearray()
            turns.append(Turn(_ROLE[symbol], b"", ended=False))
        elif data is not None and 0 <= symbol < 256:
            data.append(symbol)
        elif data is not None and symbol == END:
            turns[-1], data = Turn(turns[-1].role, bytes(data)), None
        else:
            where = "between turns" if data is None else f"in a turn {turns[-1].role.value!r}"
            raise DataError(f"symbol {symbol} at position {place} cannot be {where}")
    if data is not None:
        turns[-1] = Turn(turns[-1].role, bytes(data), ended=False)
    check(turns)
    return turns


def written(turns: Iterable[Turn]) -> np.ndarray:
    """Which symbols of a conversation the model writes, bool [n]: the loss is of these.

    They are all symbols of thoughts, calls and answers, those that begin and end them too.
    """
    lengths, flags = [], []
    for turn in turns:
        lengths.append(len(symbols_of(turn)))
        flags.append(turn.role in WRITTEN)
    return np.repeat(np.asarray(flags, bool), lengths)


def example(turns: Sequence[Turn], not_scored: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of a conversation for training, int32 [n - 1].

    A label is the class of the next symbol, or NOT_SCORED where the model does not write it, and in
    the turns with the indices `not_scored`.

    Raises:
      DataError: see `encode`.
    """
    symbols = encode(turns)
    classes = np.where(symbols < 256, symbols, symbols - END + 256)
    labels = np.where(written(turns), classes, NOT_SCORED)
    ends = np.cumsum([0, *(len(symbols_of(turn)) for turn in turns)])
    for index in not_scored:
        labels[ends[index] : ends[index + 1]] = NOT_SCORED
    return symbols[:-1], labels[1:].astype(np.int32)
