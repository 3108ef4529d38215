"""Where a run's batches come from: a byte store that is written once, or examples drawn anew."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from spectral_pod import storage
from spectral_pod.config import Config, store_and_weight
from spectral_pod.data import byte_store, pipeline, store_lease, tasks
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.data.local_copies import LocalCopies
from spectral_pod.data.mixture import Mixture
from spectral_pod.data.tasks import DrawnTask, StoredTask, Task
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.objectives import Objective
from spectral_pod.parallel import runtime


class Sources(NamedTuple):
    """The data of a run.

    Attributes:
      task: with the options of the configuration.
      stores: by name; none where examples are drawn.
      weights: of the stores, in training.
      classes: their names; empty where labels are of positions.
      digest: changes whenever the data do.
      provenance: of the records of a single store.
      former_digests: those that older versions recorded for the same data.
    """

    config: Config
    task: Task
    stores: dict[str, ByteStore]
    weights: list[float]
    classes: list[str]
    digest: str
    provenance: dict[str, Any]
    former_digests: Sequence[str] = ()

    @property
    def objective(self) -> type[Objective]:
        """What a model of this task predicts."""
        return self.task.objective

    @property
    def num_classes(self) -> int:
        """Classes of the logits: those of the stores, or else as many as the task can have."""
        return len(self.classes) or self.task.num_classes

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.task.vocab_size

    def training(self) -> pipeline.Source:
        """Shuffled batches without end; of several stores, mixed by their weights."""
        sources = self.task.batches(self.config, "train", self.stores, training=True)
        first, *others = sources.values()
        return Mixture([first, *others], self.weights) if others else first

    def wait_verified(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Waits until the content of all parts that were read is compared with their sha256.

        Raises:
          DataError: some part differs.
        """
        for store in self.stores.values():
            store.verification.wait(while_waiting)

    def evaluation(self, split: str) -> dict[str, pipeline.Source]:
        """Ordered batches that cover a split of each store once, by the name of the store."""
        return self.task.batches(self.config, split, self.stores, training=False)


def open_sources(config: Config) -> Sources:
    """The data of the configured task; a store is written first, by the leader, if there is none.

    Raises:
      UserError: the task does not have these options, its data cannot be read, or stores do not
        belong together.
    """
    options = config.data.options.to_dict()
    task = tasks.make(config.data.task, options)
    if isinstance(task, DrawnTask):
        digest, *former = (task.digest(form) for form in task.forms(options))
        return Sources(config, task, {}, [], [], digest, {}, former)
    stores, weights = _open_stores(config, task)
    first = next(iter(stores.values()))
    return Sources(
        config,
        task,
        stores,
        weights,
        [] if task.objective.by_position else first.classes,
        digest_of(stores, weights),
        first.manifest["provenance"] if len(stores) == 1 else {},
    )


def _open_stores(config: Config, task: StoredTask) -> tuple[dict[str, ByteStore], list[float]]:
    """The stores by name, and their weights: those that the configuration names, or the task's."""
    if not config.data.stores:
        return {task.name: _open_own_store(config, task)}, [1.0]
    stores: dict[str, ByteStore] = {}
    weights: list[float] = []
    copies = _copies(config)
    for entry in config.data.stores:
        path, weight = store_and_weight(entry)
        path = storage.place(path, "config.data.stores")
        storage.check_access(path, write=False)
        name = path.rpartition("/")[2]
        store = ByteStore(path, copies=copies)
        if name in stores:
            raise ConfigError(f"config.data.stores has two stores named {name!r}; rename a folder")
        first = next(iter(stores.values()), store)
        if store.classes != first.classes:
            raise DataError(
                f"{path} has classes {_few(store.classes)}, and {first.path} has "
                f"{_few(first.classes)}; stores of one run have the same, in the same order"
            )
        stores[name] = store
        weights.append(float(weight))
    return stores, weights


def _copies(config: Config) -> LocalCopies | None:
    limit = int(config.data.copies_gb * 1e9)
    return LocalCopies(config.data.copies_dir, limit) if limit else None


def _few(classes: list[str]) -> str:
    return ", ".join(classes[:8]) + (f", ... ({len(classes)})" if len(classes) > 8 else "")


def digest_of(stores: dict[str, ByteStore], weights: list[float]) -> str:
    """The digest of stores that are mixed by these weights; of one alone its own."""
    if len(stores) == 1:
        return next(iter(stores.values())).digest
    held = [[store.digest, weight] for store, weight in zip(stores.values(), weights, strict=True)]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def _open_own_store(config: Config, task: StoredTask) -> ByteStore:
    storage.check_access(task.store_path(config.data.dir), write=False)
    path = task.find_store(config.data.dir, config.data.options.to_dict())
    if runtime.is_leader() and not byte_store.exists(path):
        storage.check_access(path, write=True)
        with store_lease.hold(path):
            if not byte_store.exists(path):  # another run may have written it meanwhile
                runtime.print_once(f"writing the {task.name} data to {path}")
                task.build(path)
    runtime.barrier("data store")
    if not byte_store.exists(path):
        raise DataError(
            f"process {jax.process_index()} does not see the store {path} that process 0 wrote; "
            "set config.data.dir to a folder or gs:// URL that all hosts share"
        )
    store = ByteStore(path, copies=_copies(config))
    task.check(store)
    return store
