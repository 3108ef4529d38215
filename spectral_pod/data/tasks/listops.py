"""ListOps of the Long Range Arena: nested MIN, MAX, MED and SM over digits; the answer is a digit.

`listops_expressions.py` has the expressions, `listops_objectives.py` what is learned of them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from spectral_pod.data import byte_store, generated, pipeline
from spectral_pod.data.byte_store import Split
from spectral_pod.data.tasks.listops_expressions import (
    CHUNK,
    CLASSES,
    MAX_ARGS,
    SHORTEST,
    Bounds,
    Encoding,
    Example,
    Supervision,
    chunk,
    encode,
    ladder,
    ladder_rung,
    operator_probability,
    packed_chunk,
    values,
)
from spectral_pod.data.tasks.listops_objectives import Answer, Answers, Arguments, Subtrees
from spectral_pod.data.tasks.task import StoredTask, added, execution
from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative, Positive
from spectral_pod.objectives import Objective
from spectral_pod.shapes import PAD

if TYPE_CHECKING:
    from spectral_pod.config import DataConfig


@dataclasses.dataclass(frozen=True)
class ListOps(StoredTask):
    """Expressions; the class is the value, a digit."""

    name = "listops"
    version = 1
    objective: ClassVar[type[Objective]] = Answer
    num_classes = len(CLASSES)

    seed: int = 0  # draws the examples
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
            functools.partial(chunk, self.seed, self.bounds),
            lambda example: example.symbols,
            num_examples,
            chunk=CHUNK,
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
                    "operator_probability": operator_probability(self.bounds.max_args),
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
    supervision: ClassVar[Supervision] = "answers"

    # Rows added to those of training, filled with expressions of 4 to `min_length` symbols.
    packed: NonNegative = added(0)
    packed_args: Positive = added(MAX_ARGS)  # most arguments of an operator in them, 2 or more

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoding != "symbol":
            raise ConfigError(
                f"config.data.options.encoding is {self.encoding!r}; labels by position stand at "
                "symbols: 'symbol'"
            )
        if self.packed_args < 2:
            raise ConfigError(
                f"config.data.options.packed_args is {self.packed_args}; an operator has 2 or more"
            )
        if self.packed and self.min_length < SHORTEST:
            raise ConfigError(
                f"config.data.options.packed is {self.packed}, but no expression has min_length = "
                f"{self.min_length} symbols or fewer; the shortest has {SHORTEST}"
            )

    def splits(self) -> dict[str, Iterable[Example]]:
        """As for `ListOps`, with the packed rows."""
        found = super().splits()
        if not self.packed:
            return found
        bounds = Bounds(SHORTEST - 1, self.min_length + 1, self.max_depth, self.packed_args)
        packed = generated.distinct(
            functools.partial(packed_chunk, self.seed, bounds, self.max_length - 1),
            lambda row: row.symbols,
            self.packed,
            chunk=CHUNK,
            what="packed ListOps",
            num_workers=self.num_workers,
        )
        return found | {"train": itertools.chain(found["train"], packed)}

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
        return _Labelled(split, self.supervision, **sizes, **arguments)


@dataclasses.dataclass(frozen=True)
class ListOpsSubtrees(ListOpsAnswers):
    """The same rows; each operator's value is a label, at the bracket that ends it.

    The generator knows these values: a model that learns from them is process-supervised, and its
    results are to be reported apart.
    """

    name = "listops_subtrees"
    objective = Subtrees
    supervision: ClassVar[Supervision] = "subtrees"

    def report(
        self, evaluation: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """As for `ListOpsAnswers`."""
        facts, lines = super().report(evaluation, provenance)
        return facts, [f"process-supervised: {x}" for x in lines]


@dataclasses.dataclass(frozen=True)
class ListOpsArguments(ListOpsSubtrees):
    """The same rows and labels; where an argument begins, a label is the value of the operator
    around it over the arguments up to this one.

    So every sum is also one of its first two arguments, and of its first three, which are learned
    long before it.
    """

    name = "listops_arguments"
    objective = Arguments
    supervision = "arguments"


class _Labelled(pipeline.Batches):
    """Batches with the values of operators as labels by position."""

    def __init__(self, split: Split, supervision: Supervision, **arguments: Any):
        super().__init__(split, **arguments)
        self._supervision = supervision

    def rows(self, step: int, rows: np.ndarray) -> pipeline.Batch:
        tokens = super().rows(step, rows)["tokens"]
        labels = np.full(tokens.shape, -1, np.int32)
        for row, symbols in enumerate(tokens):
            found = values(symbols[symbols != PAD].astype(np.uint8).tobytes(), self._supervision)
            labels[row, : len(found)] = found
        return {"tokens": tokens, "labels": np.maximum(labels, 0), "valid": labels >= 0}
