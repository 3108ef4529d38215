"""What a task is: a frozen dataclass of its options, with the methods that make its examples.

    @dataclasses.dataclass(frozen=True)
    class Shout(StoredTask):
        name = "shout"
        version = 1
        num_classes = 2

        seed: int = 0
        length: Positive = 32  # bytes in a record
        num_workers: Positive = execution(1)

        def build(self, path: str) -> None: ...

The fields are the options: `config.data.options` of a config file and `--config.data.options.NAME=`
on a command line. A registered task (`TASKS["shout"] = Shout`) needs nothing anywhere else.
"""

import abc
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from spectral_pod import fields, objectives, shapes, storage
from spectral_pod.data import byte_store, pipeline
from spectral_pod.data.byte_store import ByteStore, Split
from spectral_pod.data.drawn import Drawn
from spectral_pod.errors import ConfigError

if TYPE_CHECKING:
    from spectral_pod.config import Config, DataConfig

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
Stores = Mapping[str, ByteStore]  # by the names under which they are evaluated

_SECTION = "config.data.options"
_NUM_SAMPLES = 8  # examples in the digest of a drawn task


def execution(default: Any) -> Any:
    """A field for how data are made, such as a number of workers; it does not identify the data."""
    return dataclasses.field(default=default, metadata={"identifies": False})


def added(default: Any) -> Any:
    """A field that a released task got later. At its default it does not identify the data, so that
    stores from before are still found."""
    return dataclasses.field(default=default, metadata={"added": True})


def renamed(option: str, default: Any) -> Any:
    """A field whose option has another name, one that the class uses for something else."""
    return dataclasses.field(default=default, metadata={"option": option})


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task with its options; subclasses are one of the two kinds below, and frozen dataclasses.

    Every field has a default. A constructor raises a ConfigError where a value is not of its
    field's annotation; those that are impossible together are checked in `__post_init__`.

    Attributes:
      name: in `TASKS`.
      version: raised when the same options come to mean other examples, or when `check` needs to
        know more about the files that a store was written from.
      objective: what a model of this task predicts.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    objective: ClassVar[type[objectives.Objective]]

    @property
    @abc.abstractmethod
    def num_classes(self) -> int:
        """The largest number of classes that is possible; a store records how many it has."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: bytes and special tokens."""
        return shapes.VOCAB_SIZE

    @abc.abstractmethod
    def batches(
        self, config: "Config", split: str, stores: Stores, *, training: bool
    ) -> dict[str, pipeline.Source]:
        """Batches of a split, of each store by its name, or of the task by its own.

        In training they are shuffled and have no end; otherwise they are in order, once.

        Raises:
          UserError: there is no such split, or the configuration does not fit the examples.
        """

    def report(
        self, evaluation: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """What the task adds to `result.json`, and the lines it adds to the closing report.

        Args:
          evaluation: the metrics of the evaluation at the end.
          provenance: of the store, if there is one and no other.
        """
        return {}, []

    def picture(self, record: np.ndarray) -> np.ndarray | None:
        """uint8 [height, width]: what a record, uint8 [n], shows; None where it is no picture."""
        return None

    # ---- options

    def __post_init__(self) -> None:
        types = self.annotations()
        for name, value in self.options.items():
            fields.check(types[name], value, f"{_SECTION}.{name}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """The task with these options, lists in place of tuples allowed (JSON has no tuples).

        Raises:
          ConfigError: there is no such option (names those there are), or its value cannot be.
        """
        attributes = {_option(field): field.name for field in dataclasses.fields(cls)}
        for name in sorted(set(options) - attributes.keys()):
            raise ConfigError(
                f"{_SECTION}.{name} is unknown to {cls.name}; it has {list(attributes)}"
                + fields.hint(name, attributes)
            )
        types = cls.annotations()
        return cls(**{attributes[k]: fields.conformed(types[k], x) for k, x in options.items()})

    @classmethod
    def annotations(cls) -> dict[str, Any]:
        """What each option may be, by its name: see `spectral_pod.fields`."""
        types = fields.types_of(cls)
        return {_option(field): types[field.name] for field in dataclasses.fields(cls)}

    @property
    def options(self) -> dict[str, Any]:
        """The value of every option, by its name."""
        return {_option(field): getattr(self, field.name) for field in dataclasses.fields(self)}

    def identity(self) -> dict[str, Any]:
        """The options that decide the examples; equal where the data are the same."""
        return {
            _option(field): getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("identifies", True)
            and not (field.metadata.get("added") and getattr(self, field.name) == field.default)
        }

    def forms(self, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The options that are hashed to identify the data: `identity`, and what older versions
        hashed, in which a default counted only if the configuration stated it.

        Args:
          given: the options as the configuration states them.
        """
        defaults, identity = type(self)().options, self.identity()
        changed = {name: value for name, value in identity.items() if value != defaults[name]}
        return [identity, given, changed]


@dataclasses.dataclass(frozen=True)
class StoredTask(Task):
    """A task that writes its records once, to a byte store. By default a record has a class."""

    objective: ClassVar[type[objectives.Objective]] = objectives.Classification
    stored_as: ClassVar[str] = ""  # the task whose stores it reads, if not its own

    @abc.abstractmethod
    def build(self, path: str) -> None:
        """Writes the records as a byte store to `path`, a folder or a gs:// URL.

        Raises:
          UserError: there are no such records.
        """

    def check(self, store: ByteStore) -> None:
        """Compares a store with the user's files that it was written from, if any.

        Files that are not on this host are not compared: the store does not need them.

        Raises:
          DataError: they have changed since.
        """

    def batches(
        self, config: "Config", split: str, stores: Stores, *, training: bool
    ) -> dict[str, pipeline.Source]:
        """See `Task.batches`."""
        train = config.train
        arguments = {
            "batch_size": train.global_batch_size if training else train.eval_batch_size,
            "num_records": config.data.train_records if split == "train" else 0,
            "shuffle_seed": config.seed if training else None,
        }
        return {
            name: self.read(store.split(split), config.data, **arguments)
            for name, store in stores.items()
        }

    def read(self, split: Split, data: "DataConfig", **arguments: Any) -> pipeline.Source:
        """Batches of a split of a store; `data` is `config.data`, the rest is for the source."""
        return pipeline.Batches(
            split,
            seq_len=data.seq_len,
            documents=data.documents,
            truncate=data.truncate,
            **arguments,
        )

    def store_path(self, directory: str) -> str:
        """The path of a new store of this task: `DIRECTORY/TASK-<hash of its identity>`."""
        return self._path(directory, self.identity())

    def find_store(self, directory: str, given: Mapping[str, Any]) -> str:
        """The path of this task's store, or `store_path` if there is none yet.

        A store at a path that an older version gave it is used.

        Args:
          directory: a folder or a gs:// URL.
          given: the options as the configuration states them.
        """
        paths = [self._path(directory, options) for options in self.forms(given)]
        return next(filter(byte_store.exists, paths), paths[0])

    def _path(self, directory: str, options: Mapping[str, Any]) -> str:
        key = hashlib.sha256(byte_store.FORMAT.encode() + _meaning(self, options)).hexdigest()[:8]
        return os.path.join(
            storage.place(directory, "config.data.dir", root=True),
            f"{self.stored_as or self.name}-{key}",
        )


@dataclasses.dataclass(frozen=True)
class DrawnTask(Task):
    """A task whose examples are drawn where they are needed; by default it predicts bytes."""

    objective: ClassVar[type[objectives.Objective]] = objectives.LabelledPositions

    @property
    def num_classes(self) -> int:
        """Byte b is class b."""
        return 256

    @property
    @abc.abstractmethod
    def max_length(self) -> int:
        """The most tokens that an example can have."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels int32 [n] of one example; label -1 where a position is not scored."""

    def drawer(self, split: str) -> Draw:
        """`draw` for the examples of a split, where that is another one."""
        return self.draw

    def batches(
        self, config: "Config", split: str, stores: Stores, *, training: bool
    ) -> dict[str, pipeline.Source]:
        """See `Task.batches`."""
        data, train = config.data, config.train
        source = Drawn(
            self.drawer(split),
            split,
            max_length=self.max_length,
            batch_size=train.global_batch_size if training else train.eval_batch_size,
            seq_len=data.seq_len,
            seed=config.seed,
            num_records=data.train_records if split == "train" else train.eval_records,
            repeat=training,
        )
        return {self.name: source}

    def digest(self, options: Mapping[str, Any]) -> str:
        """sha256 of the version, of one of the `forms` of the options, and of a few examples.

        The examples reveal a version of NumPy that draws other numbers from a seed.
        """
        digest = hashlib.sha256(_meaning(self, options))
        for i in range(_NUM_SAMPLES):
            for array in self.draw(np.random.default_rng(i)):
                digest.update(array.astype("<i4").tobytes())
        return digest.hexdigest()


def _option(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("option", field.name))


def _meaning(task: Task, options: Mapping[str, Any]) -> bytes:
    return json.dumps([task.version, dict(options)], sort_keys=True).encode()
