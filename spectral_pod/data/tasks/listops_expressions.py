"""Expressions of ListOps: drawn, evaluated, and written as a model reads them.

Trees are drawn as by the official generator (`lra_benchmarks/data/listops.py`): a node is an
operator with probability 1/4, with 2 to 10 arguments, and else a digit; nodes at depth 10 are
digits; trees of 500 < length < 2000 are kept, where length counts operators, digits and `]`.
Options set other bounds, for trees that small models learn in minutes.

An example is held as its *symbols*, one byte each: `<` MIN, `>` MAX, `=` MED, `+` SM, `0` to `9`,
and `]`, which ends the arguments of an operator. `[MAX 3 [SM 7 8 ] ]` is `>3+78]]`.
"""

import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from spectral_pod import fields
from spectral_pod.errors import ConfigError

MAX_ARGS = 10
CLASSES = tuple("0123456789")
Encoding = Literal["raw", "stripped", "symbol"]
Supervision = Literal["answers", "subtrees", "arguments"]
ENCODINGS: tuple[str, ...] = get_args(Encoding)
RUNGS = range(6)

_MIN, _MAX, _MED, SM = OPERATORS = b"<>=+"
CLOSE = ord("]")
NAMES = ("min", "max", "med", "sm")  # of the operators
_DIGITS = b"0123456789"
_TOKENS = {
    **dict(zip(OPERATORS, (b"[MIN", b"[MAX", b"[MED", b"[SM"), strict=True)),
    **{symbol: bytes([symbol]) for symbol in b"]0123456789"},
}
_SYMBOLS = {token: symbol for symbol, token in _TOKENS.items()}

_PATIENCE = 1_000_000  # trees drawn without one to keep
SHORTEST = 4  # symbols of an expression: an operator, two digits and `]`
CHUNK = 250  # examples drawn from one random stream; part of what a seed means


class Example(NamedTuple):
    """One expression, as symbols, and its value, 0 to 9."""

    symbols: bytes
    answer: int


def _median(values: Sequence[int]) -> int:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2


_APPLY: dict[int, Callable[[Sequence[int]], int]] = {
    _MIN: min,
    _MAX: max,
    _MED: _median,
    SM: lambda values: sum(values) % 10,
}
# The likeliest value of a node of which only the operator is known. SM is uniform, so alone any
# value is as good; a middle one disturbs the operators above it least.
_GUESS = {_MIN: 0, _MAX: 9, _MED: 4, SM: 4}


def evaluate(symbols: bytes, levels: float = math.inf) -> int:
    """The value of an expression, or what evaluating only its top levels makes of it.

    Operators at depth `levels` or above (the root is at depth 1) are evaluated exactly. One below
    counts as a constant of its operator: MIN 0, MAX 9, MED 4, SM 4; its arguments are not used.
    The default evaluates everything.
    """
    outer: list[tuple[int, list[int]]] = []
    operator, values = 0, list[int]()
    for symbol in symbols:
        if symbol in _APPLY:
            outer.append((operator, values))
            operator, values = symbol, []
        elif symbol == CLOSE:
            value = _APPLY[operator](values) if len(outer) <= levels else _GUESS[operator]
            operator, values = outer.pop()
            values.append(value)
        else:
            values.append(symbol - _DIGITS[0])
    (value,) = values
    return value


def values(symbols: bytes, supervision: Supervision) -> np.ndarray:
    """int32 [n]: the values of operators where `supervision` has them as labels, elsewhere -1.

    Args:
      symbols: an expression, or several, one after the other.
      supervision: 'answers' is the value of an expression, at the `]` that ends it. 'subtrees' is
        that of every operator, at its `]`. 'arguments' adds, where each argument begins, the value
        of the operator around it over the arguments up to this one.
    """
    found_N = np.full(len(symbols), -1, np.int32)
    outer: list[tuple[int, int, list[int]]] = []
    operator, begin, arguments = 0, 0, list[int]()
    for i, symbol in enumerate(symbols):
        if symbol in _APPLY:
            outer.append((operator, begin, arguments))
            operator, begin, arguments = symbol, i, []
            continue
        first = i  # symbol of the argument that ends here
        if symbol == CLOSE:
            value, first = _APPLY[operator](arguments), begin
            operator, begin, arguments = outer.pop()
            if not outer or supervision != "answers":
                found_N[i] = value
        else:
            value = symbol - _DIGITS[0]
        arguments.append(value)
        if outer and supervision == "arguments":
            found_N[first] = _APPLY[operator](arguments)
    return found_N


def encode(symbols: bytes, encoding: str) -> bytes:
    """The symbols of an expression as the bytes that a model reads.

    `symbol` is the symbols themselves, under 2,000 bytes; `stripped` writes tokens separated by
    spaces, `[MAX 3 4 ]`; `raw` is the official text, where every argument and every `]` is
    applied by a pair of parentheses of its own, `( ( ( [MAX 3 ) 4 ) ] )`.

    Raises:
      ConfigError: there is no such encoding.
    """
    fields.one_of("encoding", encoding, ENCODINGS)
    if encoding == "symbol":
        return symbols
    if encoding == "stripped":
        return b" ".join(_TOKENS[symbol] for symbol in symbols)
    # Backwards, because the parentheses before an operator count the arguments after it.
    tokens: list[bytes] = []
    num_args: list[int] = []  # so far, of each operator around the symbol
    for symbol in reversed(symbols):
        if symbol in _APPLY:
            tokens.append(_TOKENS[symbol])
            tokens += [b"("] * (num_args.pop() + 1)
            continue
        if num_args:
            num_args[-1] += 1
            tokens.append(b")")
        if symbol == CLOSE:
            num_args.append(0)
            tokens.append(b")")
        tokens.append(_TOKENS[symbol])
    return b" ".join(reversed(tokens))


def decode(data: bytes, encoding: str) -> bytes:
    """The symbols that `encode` wrote as `data`.

    Raises:
      ConfigError: there is no such encoding.
    """
    fields.one_of("encoding", encoding, ENCODINGS)
    if encoding == "symbol":
        return data
    return bytes(_SYMBOLS[token] for token in data.split() if token not in (b"(", b")"))


class Bounds(NamedTuple):
    """Which trees are kept; both lengths are exclusive."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10  # of a node, the root being at depth 1; nodes there are digits
    max_args: int = MAX_ARGS  # of an operator, which has 2 or more


def operator_probability(max_args: int) -> float:
    """That of a node being an operator. At 10 arguments it is the official 1/4.

    Whatever `max_args` is, an operator has one and a half others as arguments, on average.
    """
    return 3 / (max_args + 2)


@functools.cache
def _nodes(max_args: int) -> list[tuple[int, int]]:
    """One uniform draw from this table is a whole node: a symbol and its number of arguments."""
    operator, digit = 15, 2 * (max_args - 1) ** 2  # places of each number of arguments, each digit
    shared = math.gcd(operator, digit)
    nodes = [
        (op, n)
        for op in OPERATORS
        for n in range(2, max_args + 1)
        for _ in range(operator // shared)
    ]
    return nodes + [(symbol, 0) for symbol in _DIGITS for _ in range(digit // shared)]


def _draw(uniform: Callable[[], float], bounds: Bounds) -> bytes | None:
    """The symbols of one tree, or None for one too short or too long; `uniform` draws from [0, 1).

    A tree starts as one leaf and each operator with n arguments adds n + 1 to its length, so the
    length so far is a lower bound that rises with every operator, and a tree that will be too long
    is left at once.
    """
    symbols = bytearray()
    missing: list[int] = []  # arguments to come, of every open operator
    nodes = _nodes(bounds.max_args)
    length, num_nodes = 1, len(nodes)
    while True:
        if len(missing) < bounds.max_depth - 1:
            symbol, num_args = nodes[int(uniform() * num_nodes)]
        else:
            symbol, num_args = _DIGITS[int(uniform() * len(_DIGITS))], 0
        symbols.append(symbol)
        if num_args:
            length += num_args + 1
            if length >= bounds.max_length:
                return None
            missing.append(num_args)
            continue
        while missing:
            missing[-1] -= 1
            if missing[-1]:
                break
            missing.pop()
            symbols.append(CLOSE)
        if not missing:
            return bytes(symbols) if length > bounds.min_length else None


def chunk(seed: int, bounds: Bounds, index: int) -> list[Example]:
    # Python promises that random() keeps its stream for a seed in every version.
    uniform = random.Random(f"ListOps {seed} {index}").random
    examples: list[Example] = []
    in_vain = 0
    while len(examples) < CHUNK:
        if symbols := _draw(uniform, bounds):
            examples.append(Example(symbols, evaluate(symbols)))
            in_vain = 0
        elif (in_vain := in_vain + 1) == _PATIENCE:
            raise ConfigError(
                f"config.data.options: of {_PATIENCE:,} expressions drawn none was longer than "
                f"min_length = {bounds.min_length} symbols and shorter than max_length = "
                f"{bounds.max_length}, with max_depth = {bounds.max_depth}; widen these"
            )
    return examples


def packed_chunk(seed: int, bounds: Bounds, row_length: int, index: int) -> list[Example]:
    """Rows of expressions, each as many as fit; the answer is that of the last one."""
    uniform = random.Random(f"packed ListOps {seed} {index}").random
    rows: list[Example] = []
    row = last = b""
    while len(rows) < CHUNK:
        if not (symbols := _draw(uniform, bounds)):
            continue
        if len(row) + len(symbols) > row_length:
            rows.append(Example(row, evaluate(last)))
            row = b""
        row, last = row + symbols, symbols
    return rows


def ladder(examples: Iterable[Example]) -> dict[str, float]:
    """What share of answers the evaluation of the top k levels earns, by rung k = 0 to 5.

    Rung k is `evaluate(symbols, levels=k)`: exact for operators of depth 1 to k, and below that a
    constant for each operator (MIN 0, MAX 9, MED 4, SM 4). Rung 0 knows only the root operator.
    Over 96,000 examples the rungs are 36.2, 59.5, 73.8, 83.3, 89.7 and 93.5 %; those of a test
    split of 2,000 differ from these by a point or so.
    """
    examples = list(examples)
    right = {k: sum(evaluate(e.symbols, k) == e.answer for e in examples) for k in RUNGS}
    return {str(k): right[k] / len(examples) for k in RUNGS}


def ladder_rung(accuracy: float, ladder: Mapping[str, float]) -> str:
    """One line that says where an accuracy stands on a ladder; both are fractions."""
    named = [f"rung {k} ({share:.1%})" for k, share in sorted(ladder.items())]
    reached = sum(accuracy >= share for share in ladder.values())
    if reached == 0:
        place = f"below {named[0]}"
    elif reached == len(named):
        place = f"at or above {named[-1]}"
    else:
        place = f"between {named[reached - 1]} and {named[reached]}"
    return f"accuracy {accuracy:.1%} stands {place}"
