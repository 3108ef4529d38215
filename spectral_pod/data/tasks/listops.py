"""ListOps of the Long Range Arena: nested MIN, MAX, MED and SM over digits; the answer is a digit.

Trees are drawn as by the official generator (`lra_benchmarks/data/listops.py`): a node is an
operator with probability 1/4, with 2 to 10 arguments, and else a digit; nodes at depth 10 are
digits; trees of 500 < length < 2000 are kept, where length counts operators, digits and `]`.
Options set other bounds, for trees that small models learn in minutes.

An example is held as its *symbols*, one byte each: `<` MIN, `>` MAX, `=` MED, `+` SM, `0` to `9`,
and `]`, which ends the arguments of an operator. `[MAX 3 [SM 7 8 ] ]` is `>3+78]]`.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, get_args

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from spectral_pod import fields
from spectral_pod.data import byte_store, generated, pipeline
from spectral_pod.data.byte_store import Split
from spectral_pod.data.tasks.task import StoredTask, added, execution
from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative, Positive
from spectral_pod.objectives import Classification, Count, LabelledPositions, Objective
from spectral_pod.shapes import PAD

if TYPE_CHECKING:
    from spectral_pod.config import DataConfig

MAX_ARGS = 10
CLASSES = tuple("0123456789")
Encoding = Literal["raw", "stripped", "symbol"]
ENCODINGS: tuple[str, ...] = get_args(Encoding)
RUNGS = range(6)

_MIN, _MAX, _MED, _SM = _OPERATORS = b"<>=+"
_CLOSE = ord("]")
_NAMES = ("min", "max", "med", "sm")  # of the operators
_DIGITS = b"0123456789"
_TOKENS = {
    **dict(zip(_OPERATORS, (b"[MIN", b"[MAX", b"[MED", b"[SM"), strict=True)),
    **{symbol: bytes([symbol]) for symbol in b"]0123456789"},
}
_SYMBOLS = {token: symbol for symbol, token in _TOKENS.items()}

# One uniform draw from this table is a whole node, (symbol, number of arguments): each of the 36
# operator nodes fills 5 of the 720 places (1/4 in all), and each digit 54 (3/4 in all).
_NODES = [(op, n) for op in _OPERATORS for n in range(2, MAX_ARGS + 1) for _ in range(5)]
_NODES += [(digit, 0) for digit in _DIGITS for _ in range(54)]
OPERATOR_PROBABILITY = sum(num_args > 0 for _, num_args in _NODES) / len(_NODES)

_PATIENCE = 1_000_000  # trees drawn without one to keep
_SHORTEST = 4  # symbols of an expression: an operator, two digits and `]`
_CHUNK = 250  # examples drawn from one random stream; part of what a seed means


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
    _SM: lambda values: sum(values) % 10,
}
# The likeliest value of a node of which only the operator is known. SM is uniform, so alone any
# value is as good; a middle one disturbs the operators above it least.
_GUESS = {_MIN: 0, _MAX: 9, _MED: 4, _SM: 4}


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
        elif symbol == _CLOSE:
            value = _APPLY[operator](values) if len(outer) <= levels else _GUESS[operator]
            operator, values = outer.pop()
            values.append(value)
        else:
            values.append(symbol - _DIGITS[0])
    (value,) = values
    return value


def subtree_values(symbols: bytes, roots_only: bool = False) -> np.ndarray:
    """int32 [n]: at every `]` the value of the operator that it ends, elsewhere -1.

    Args:
      symbols: an expression, or several, one after the other.
      roots_only: leaves out operators within others.
    """
    found_N = np.full(len(symbols), -1, np.int32)
    outer: list[tuple[int, list[int]]] = []
    operator, values = 0, list[int]()
    for i, symbol in enumerate(symbols):
        if symbol in _APPLY:
            outer.append((operator, values))
            operator, values = symbol, []
        elif symbol == _CLOSE:
            value = _APPLY[operator](values)
            operator, values = outer.pop()
            if not (roots_only and outer):
                found_N[i] = value
            values.append(value)
        else:
            values.append(symbol - _DIGITS[0])
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
        if symbol == _CLOSE:
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


def _draw(uniform: Callable[[], float], bounds: Bounds) -> bytes | None:
    """The symbols of one tree, or None for one too short or too long; `uniform` draws from [0, 1).

    A tree starts as one leaf and each operator with n arguments adds n + 1 to its length, so the
    length so far is a lower bound that rises with every operator, and a tree that will be too long
    is left at once.
    """
    symbols = bytearray()
    missing: list[int] = []  # arguments to come, of every open operator
    length, num_nodes = 1, len(_NODES)
    while True:
        if len(missing) < bounds.max_depth - 1:
            symbol, num_args = _NODES[int(uniform() * num_nodes)]
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
            symbols.append(_CLOSE)
        if not missing:
            return bytes(symbols) if length > bounds.min_length else None


def _chunk(seed: int, bounds: Bounds, index: int) -> list[Example]:
    # Python promises that random() keeps its stream for a seed in every version.
    uniform = random.Random(f"ListOps {seed} {index}").random
    examples: list[Example] = []
    in_vain = 0
    while len(examples) < _CHUNK:
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


def _packed_chunk(seed: int, bounds: Bounds, row_length: int, index: int) -> list[Example]:
    """Rows of expressions, each as many as fit; the answer is that of the last one."""
    uniform = random.Random(f"packed ListOps {seed} {index}").random
    rows: list[Example] = []
    row = last = b""
    while len(rows) < _CHUNK:
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
    Over 40,000 examples the rungs are 36.5, 59.5, 73.6, 83.1, 89.6 and 93.6 %; those of a test
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


@flax.struct.dataclass
class ByRoot(metrics.Metric):
    """The accuracy of the expressions of each root operator: "accuracy_min", ..., "accuracy_sm"."""

    formats: ClassVar = {f"accuracy_{name}": "" for name in _NAMES}
    descriptions: ClassVar = {
        f"accuracy_{name}": f"Accuracy on expressions whose root is {name.upper()}, in [0, 1]"
        for name in _NAMES
    }

    right_O: jax.Array  # float32 [4], of the operators in the order of `_OPERATORS`
    total_O: jax.Array  # float32 [4]

    @classmethod
    def from_model_output(
        cls, tokens: jax.Array, correct: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        # As text the root follows the first bracket: [MIN, [MAX, [MED, [SM differ in the next but
        # one byte. Symbols have no such bracket, and begin with the root.
        is_bracket_BL = tokens == ord("[")
        first_B = jnp.argmax(is_bracket_BL, axis=1)
        place_B = jnp.where(jnp.any(is_bracket_BL, axis=1), first_B + 2, 0)
        root_B = jnp.take_along_axis(tokens, place_B[:, None], axis=1)[:, 0]
        names_2O = jnp.asarray([list(_OPERATORS), list(b"IAEM")])
        is_root_BO = jnp.any(root_B[:, None, None] == names_2O[None], axis=1) & mask[:, None]
        is_root_BO = is_root_BO.astype(jnp.float32)
        return cls(jnp.einsum("b,bo->o", correct, is_root_BO), jnp.sum(is_root_BO, axis=0))

    def merge(self, other: Self) -> Self:
        return type(self)(self.right_O + other.right_O, self.total_O + other.total_O)

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        counts = zip(_NAMES, np.asarray(self.right_O), np.asarray(self.total_O))
        return {f"accuracy_{name}": float(r / n) for name, r, n in counts if n}


class Answer(Classification):
    """The value of an expression, also by its root operator."""

    evaluation_metrics: ClassVar = Classification.evaluation_metrics | {"by_root": ByRoot}
    formats: ClassVar = Classification.formats | ByRoot.formats
    descriptions: ClassVar = Classification.descriptions | ByRoot.descriptions


def _is_last(mask_BL: jax.Array) -> jax.Array:
    """float32 [B, L]: 1 at the last position of the mask in each row."""
    place_BL = jnp.where(mask_BL, jnp.arange(1, mask_BL.shape[1] + 1)[None], 0)
    is_last_BL = mask_BL & (place_BL == jnp.max(place_BL, axis=1, keepdims=True))
    return is_last_BL.astype(jnp.float32)


@flax.struct.dataclass
class LastAccuracy(metrics.Average):
    """The accuracy at the last valid position of each row: of whole expressions."""

    @classmethod
    def from_model_output(cls, correct: jax.Array, mask: jax.Array, **_: Any) -> Self:
        last_BL = _is_last(mask)
        return cls(total=jnp.sum(correct * last_BL), count=jnp.sum(last_BL))


@flax.struct.dataclass
class ByLastRoot(ByRoot):
    """The same, of the last valid position of each row."""

    @classmethod
    def from_model_output(
        cls, tokens: jax.Array, correct: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        last_BL = _is_last(mask)
        correct_B, mask_B = jnp.sum(correct * last_BL, axis=1), jnp.any(mask, axis=1)
        return super().from_model_output(tokens, correct_B, mask_B)


class Answers(LabelledPositions):
    """The values of the expressions of a row, each at its end; "accuracy" is of the last one."""

    for_causal_models = False
    training_metrics: ClassVar = {
        "loss": metrics.Average.from_output("loss"),
        "accuracy": LastAccuracy,
    }
    evaluation_metrics: ClassVar = training_metrics | {"by_root": ByLastRoot, "positions": Count}
    formats: ClassVar = LabelledPositions.formats | ByRoot.formats
    descriptions: ClassVar = (
        LabelledPositions.descriptions
        | {"accuracy": "Accuracy of the last expression of each row, in [0, 1]"}
        | ByRoot.descriptions
    )


def heights(tokens_BL: jax.Array) -> jax.Array:
    """int32 [B, L]: at every `]` the height of the operator that it ends, elsewhere 0.

    The height is 1 where all arguments are digits, and else one more than that of the highest
    operator among them. Expressions are given as symbols.
    """
    is_open_BL = jnp.isin(tokens_BL, jnp.asarray(list(_OPERATORS)))
    is_close_BL = tokens_BL == _CLOSE
    # An operator and its `]` are two symbols.
    depth_1D = jnp.arange(tokens_BL.shape[1] // 2 + 2)[None]

    def step(carry: Any, at: Any) -> tuple[Any, jax.Array]:
        # Of the operators that are open, the highest argument so far, by their depth.
        highest_BD, depth_B = carry
        is_open_B, is_close_B = at
        depth_B += is_open_B.astype(jnp.int32)
        here_BD = depth_1D == depth_B[:, None]
        highest_BD = jnp.where(here_BD & is_open_B[:, None], 0, highest_BD)
        height_B = jnp.max(jnp.where(here_BD, highest_BD, 0), axis=1) + 1
        height_B = jnp.where(is_close_B, height_B, 0)
        depth_B -= is_close_B.astype(jnp.int32)
        around_BD = depth_1D == depth_B[:, None]
        highest_BD = jnp.where(around_BD, jnp.maximum(highest_BD, height_B[:, None]), highest_BD)
        return (highest_BD, depth_B), height_B

    batch = len(tokens_BL)
    start = jnp.zeros((batch, depth_1D.size), jnp.int32), jnp.zeros(batch, jnp.int32)
    _, heights_LB = jax.lax.scan(step, start, (is_open_BL.T, is_close_BL.T))
    return heights_LB.T


@flax.struct.dataclass
class ByHeight(metrics.Metric):
    """The accuracy of operators by their `heights`: "accuracy_height_1", ..., and that of sums of
    digits alone, "accuracy_flat_sm"."""

    formats: ClassVar = {f"accuracy_height_{h}": "" for h in range(1, 10)} | {
        "accuracy_flat_sm": ""
    }
    descriptions: ClassVar = {
        **{
            f"accuracy_height_{h}": f"Accuracy of operators above {h - 1} others, in [0, 1]"
            for h in range(1, 10)
        },
        "accuracy_flat_sm": "Accuracy of SM of digits alone, in [0, 1]",
    }

    right_K: jax.Array  # float32 [10], of heights 1 to 9, and of flat sums
    total_K: jax.Array  # float32 [10]

    @classmethod
    def from_model_output(
        cls, tokens: jax.Array, correct: jax.Array, mask: jax.Array, **_: Any
    ) -> Self:
        height_BL = heights(tokens)
        # Of an operator with digits alone the last one before its `]` is its own.
        place_BL = jnp.where(
            jnp.isin(tokens, jnp.asarray(list(_OPERATORS))), jnp.arange(tokens.shape[1])[None], 0
        )
        operator_BL = jnp.take_along_axis(tokens, jax.lax.cummax(place_BL, axis=1), axis=1)
        is_flat_sm_BL = (height_BL == 1) & (operator_BL == _SM)
        kinds_KBL = jnp.stack([height_BL == h for h in range(1, 10)] + [is_flat_sm_BL])
        kinds_KBL = (kinds_KBL & mask[None]).astype(jnp.float32)
        return cls(jnp.einsum("kbl,bl->k", kinds_KBL, correct), jnp.sum(kinds_KBL, axis=(1, 2)))

    def merge(self, other: Self) -> Self:
        return type(self)(self.right_K + other.right_K, self.total_K + other.total_K)

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        counts = zip(self.formats, np.asarray(self.right_K), np.asarray(self.total_K))
        return {name: float(right / n) for name, right, n in counts if n}


class Subtrees(Answers):
    """The value of every operator, at the bracket that ends it. "accuracy" is that of the whole
    expressions, comparable with other objectives; "subtree_accuracy" is of all operators."""

    training_metrics: ClassVar = Answers.training_metrics | {
        "subtree_accuracy": metrics.Average.from_output("correct"),
    }
    evaluation_metrics: ClassVar = (
        Answers.evaluation_metrics | training_metrics | {"by_height": ByHeight}
    )
    formats: ClassVar = Answers.formats | {"subtree_accuracy": "subtrees {:.2%}"} | ByHeight.formats
    descriptions: ClassVar = (
        Answers.descriptions
        | {"subtree_accuracy": "Accuracy of the values of all operators, in [0, 1]"}
        | ByHeight.descriptions
    )


@dataclasses.dataclass(frozen=True)
class ListOps(StoredTask):
    """Expressions; the class is the value, a digit."""

    name = "listops"
    version = 1
    objective: ClassVar[type[Objective]] = Answer
    num_classes = len(CLASSES)

    seed: int = 0
    encoding: Encoding = "symbol"  # how a model reads an expression: see `encode`
    train: Positive = 96_000  # distinct examples; likewise validation and test
    validation: Positive = 2_000
    test: Positive = 2_000
    min_length: NonNegative = added(500)  # symbols of an expression, exclusive
    max_length: Positive = added(2000)  # likewise
    max_depth: Positive = added(10)  # of a node, the root being at depth 1; nodes there are digits
    num_workers: int | None = execution(None)  # processes that draw; None is one per core

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.min_length, self.max_length, self.max_depth)

    def generate(self, num_examples: int) -> Iterator[Example]:
        """Distinct examples, drawn by workers, some 2,000 a second each: `generated.distinct`."""
        return generated.distinct(
            functools.partial(_chunk, self.seed, self.bounds),
            lambda example: example.symbols,
            num_examples,
            chunk=_CHUNK,
            what="ListOps",
            num_workers=self.num_workers,
        )

    def splits(self) -> dict[str, Iterable[Example]]:
        """Distinct examples by split: see `generated.splits`."""
        return generated.splits(
            self.generate, train=self.train, validation=self.validation, test=self.test
        )

    def build(self, path: str) -> None:
        """Writes the examples as a byte store.

        The manifest's provenance holds the parameters of the generator and the `ladder` of the
        test split.
        """
        examples = self.splits()
        examples["test"] = list(examples["test"])
        byte_store.write(
            path,
            {split: map(self._record, drawn) for split, drawn in examples.items()},
            classes=CLASSES,
            provenance={
                "task": "listops",
                "generator": {
                    "seed": self.seed,
                    "operator_probability": OPERATOR_PROBABILITY,
                    "max_args": MAX_ARGS,
                    **self.bounds._asdict(),
                },
                "encoding": self.encoding,
                "ladder": ladder(examples["test"]),
            },
        )

    def _record(self, example: Example) -> byte_store.Record:
        return byte_store.Record(encode(example.symbols, self.encoding), example.answer)

    def report(
        self, evaluation: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """The ladder of the test split, and where the accuracy stands on it."""
        rungs = provenance.get("ladder")
        if not rungs:
            return {}, []
        return {"ladder": rungs}, [ladder_rung(evaluation["accuracy"], rungs)]


@dataclasses.dataclass(frozen=True)
class ListOpsAnswers(ListOps):
    """The same expressions; the value is a label at the bracket that ends the expression.

    Rows of training may hold several expressions, so that short ones can be learned first without
    padding. Those of `packed` are no longer than `min_length`, and so are in no split.
    """

    name = "listops_answers"
    stored_as = "listops"
    objective = Answers
    supervision: ClassVar[str] = "answers"

    # Rows added to those of training, filled with expressions of 4 to `min_length` symbols.
    packed: NonNegative = added(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoding != "symbol":
            raise ConfigError(
                f"config.data.options.encoding is {self.encoding!r}; labels by position stand at "
                "symbols: 'symbol'"
            )
        if self.packed and self.min_length < _SHORTEST:
            raise ConfigError(
                f"config.data.options.packed is {self.packed}, but no expression has min_length = "
                f"{self.min_length} symbols or fewer; the shortest has {_SHORTEST}"
            )

    def splits(self) -> dict[str, Iterable[Example]]:
        """As for `ListOps`, with the packed rows."""
        found = super().splits()
        bounds = Bounds(_SHORTEST - 1, self.min_length + 1, self.max_depth)
        packed = generated.distinct(
            functools.partial(_packed_chunk, self.seed, bounds, self.max_length - 1),
            lambda row: row.symbols,
            self.packed,
            chunk=_CHUNK,
            what="packed ListOps",
            num_workers=self.num_workers,
        )
        return found | {"train": itertools.chain(found["train"], packed if self.packed else ())}

    def report(
        self, evaluation: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """As for `ListOps`; also says how the model was supervised."""
        facts, lines = super().report(evaluation, provenance)
        return {"supervision": self.supervision} | facts, lines

    def read(self, split: Split, data: "DataConfig", **arguments: Any) -> pipeline.Source:
        """See `StoredTask.read`."""
        if data.truncate:
            raise ConfigError("config.data.truncate would cut off the answer of an expression")
        sizes = {"seq_len": data.seq_len, "documents": data.documents}
        return _Labelled(split, self.supervision == "answers", **sizes, **arguments)


@dataclasses.dataclass(frozen=True)
class ListOpsSubtrees(ListOpsAnswers):
    """The same rows; each operator's value is a label, at the bracket that ends it.

    The generator knows these values: a model that learns from them is process-supervised, and its
    results are to be reported apart.
    """

    name = "listops_subtrees"
    objective = Subtrees
    supervision = "subtrees"

    def report(
        self, evaluation: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """As for `ListOpsAnswers`."""
        facts, lines = super().report(evaluation, provenance)
        return facts, [f"process-supervised: {x}" for x in lines]


class _Labelled(pipeline.Batches):
    """Batches with the values of expressions, or of all operators, as labels by position."""

    def __init__(self, split: Split, roots_only: bool, **arguments: Any):
        super().__init__(split, **arguments)
        self._roots_only = roots_only

    def rows(self, step: int, rows: np.ndarray) -> pipeline.Batch:
        tokens = super().rows(step, rows)["tokens"]
        labels = np.zeros(tokens.shape, np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, symbols in enumerate(tokens):
            values = subtree_values(
                symbols[symbols != PAD].astype(np.uint8).tobytes(), self._roots_only
            )
            valid[row, : len(values)] = values >= 0
            labels[row, : len(values)] = np.maximum(values, 0)
        return {"tokens": tokens, "labels": labels, "valid": valid}
