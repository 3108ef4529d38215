"""Conversations of traces, files that agents write (`agent/traces.py`), to train agents on.

    --config.data.task=agent_traces --config.data.options.train='traces/*.jsonl'

The loss is of what the model writes, thoughts, calls and answers, but for calls whose result is an
error: a model is to learn to correct mistakes, and not to make them. So what came of a call has to
be known, and conversations must have ended with an answer.

Without files for validation a twentieth of the conversations is held out: all that begin with the
same question, in the order of a hash of it.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_pod import objectives
from spectral_pod.agent import protocol, traces
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.data import byte_store, formats, origin, pipeline
from spectral_pod.data.byte_store import Record
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks.task import StoredTask, Stores
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.shapes import PAD
from spectral_pod.storage import Source

if TYPE_CHECKING:
    from spectral_pod.config import Config, DataConfig

SPLITS = ("train", "validation", "test")
_SYMBOL = np.dtype("<u2")  # of a conversation in a store
_HELD_OUT = 20  # one of so many questions


@dataclasses.dataclass(frozen=True)
class AgentTraces(StoredTask):
    """Conversations with tools, as they were recorded."""

    name = "agent_traces"
    version = 1
    objective = objectives.LabelledPositions
    num_classes = protocol.NUM_CLASSES

    seed: int = 0  # of the hash that decides which questions are held out
    train: Source = ""  # a file, a folder or a glob
    validation: Source = ""  # likewise; "" holds out a part of the conversations for training
    test: Source = ""  # likewise; no such split without files

    @property
    def vocab_size(self) -> int:
        """See `Task.vocab_size`."""
        return protocol.VOCAB_SIZE

    @property
    def sources(self) -> dict[str, str]:
        """The sources that are given, by split."""
        sources = {split: getattr(self, split) for split in SPLITS}
        return {split: source for split, source in sources.items() if source}

    def build(self, path: str) -> None:
        """Writes the conversations; a record is the symbols of one, in 16 bits each.

        Raises:
          ConfigError: there are no files to train on.
          DataError: a file is missing or is no traces, a conversation has no answer, or nothing is
            left for a split.
        """
        if not self.train:
            raise ConfigError(
                "config.data.options.train is empty; name a file of traces, as tools.agent --out "
                "and tools.traces write them"
            )
        splits: dict[str, list[Record]] = {split: [] for split in ("train", "validation")}
        for split, source in self.sources.items():
            records = splits.setdefault(split, [])
            progress = Progress("Reading traces", 0, "conversations")
            for turns in _conversations(formats.files(source)):
                progress.add()
                symbols = protocol.encode(turns).astype(_SYMBOL).tobytes()
                if split == "train" and not self.validation and self._is_held_out(turns[0]):
                    splits["validation"].append(Record(symbols, 0))
                else:
                    records.append(Record(symbols, 0))
            progress.end()
        for split, records in splits.items():
            if not records:
                raise DataError(
                    f"config.data.options.{split} is {getattr(self, split)!r}, and there are no "
                    f"conversations for the {split} split; add some to config.data.options.{split}"
                )
        described = {s: origin.describe(formats.files(x)) for s, x in self.sources.items()}
        provenance = {"task": self.name, "sources": described}
        byte_store.write(path, splits, classes=("conversation",), provenance=provenance)

    def _is_held_out(self, question: Turn) -> bool:
        digest = hashlib.blake2b(b"%d/" % self.seed, digest_size=8)
        digest.update(question.data)
        return int.from_bytes(digest.digest(), "little") % _HELD_OUT == 0

    def check(self, store: byte_store.ByteStore) -> None:
        """See `StoredTask.check`."""
        described = store.manifest["provenance"].get("sources", {})
        for split, source in self.sources.items():
            what = f"config.data.options.{split} = {source!r}"
            origin.check(origin.on_this_host(source), described.get(split), what, store.path)

    def batches(
        self, config: "Config", split: str, stores: Stores, *, training: bool
    ) -> dict[str, pipeline.Source]:
        """See `Task.batches`."""
        for store in stores.values():
            if split not in store.manifest["splits"]:
                raise DataError(
                    f"{store.path} has no {split} split; name its files with "
                    f"config.data.options.{split}, or evaluate another split: "
                    "config.train.eval_split='validation'"
                )
        return super().batches(config, split, stores, training=training)

    def read(
        self, split: byte_store.Split, data: "DataConfig", **arguments: Any
    ) -> "Conversations":
        """See `StoredTask.read`."""
        return Conversations(split, seq_len=data.seq_len, truncate=data.truncate, **arguments)


class Conversations:
    """Batches of conversations: see `pipeline.Batches`."""

    def __init__(
        self, split: byte_store.Split, *, seq_len: int, truncate: bool = False, **arguments: Any
    ):
        """Reads a split of a store that `AgentTraces` wrote; `arguments` are of `Batches`.

        Raises:
          DataError: the split is empty, or a conversation is longer than `seq_len`, without
            `truncate`, which cuts it.
        """
        longest = max(split.lengths, default=0) // _SYMBOL.itemsize - 1
        if longest > seq_len and not truncate:
            raise DataError(
                f"the longest conversation of split {split.name!r} has {longest} tokens, more than "
                f"config.data.seq_len = {seq_len}; raise it, or set config.data.truncate"
            )
        self.seq_len = seq_len
        width = (max(longest, seq_len) + 1) * _SYMBOL.itemsize
        self._batches = pipeline.Batches(split, seq_len=width, **arguments)
        self.batch_size, self.num_records = self._batches.batch_size, self._batches.num_records

    @property
    def steps_per_epoch(self) -> int:
        """See `pipeline.Source`."""
        return self._batches.steps_per_epoch

    def rows(self, step: int, rows: np.ndarray) -> pipeline.Batch:
        """See `pipeline.Source`: tokens, and labels of the symbols that follow them, [b, L]."""
        shape = len(rows), self.seq_len
        tokens, labels = np.full(shape, PAD, np.int32), np.full(shape, -1, np.int32)
        for row, raw in enumerate(self._batches.rows(step, rows)["tokens"]):
            data = raw[raw != PAD].astype(np.uint8)
            if len(data):
                turns = protocol.decode(data.view(_SYMBOL))
                for array, values in zip((tokens, labels), example(turns), strict=True):
                    cut = values[: self.seq_len]
                    array[row, : len(cut)] = cut
        valid = labels >= 0
        return {"tokens": tokens, "labels": np.where(valid, labels, 0), "valid": valid}


def example(turns: list[Turn]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of a conversation; calls whose result is an error are not scored."""
    failed = [
        index
        for index, (turn, after) in enumerate(itertools.pairwise(turns))
        if turn.role == Role.CALL and after.data.startswith(b"error: ")
    ]
    return protocol.example(turns, not_scored=failed)


def _conversations(files: list[str]) -> Iterator[tuple[Turn, ...]]:
    """The turns of all traces, in order."""
    for file in files:
        for number, trace in enumerate(traces.read(file), 1):
            if trace.answer is None:
                raise DataError(
                    f"{file}: conversation {number} does not end with an answer; leave it out"
                )
            yield trace.turns
