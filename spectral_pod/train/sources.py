"""Where a run's batches come from: a byte store that is written once, or examples drawn anew."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from spectral_pod import storage
from spectral_pod.config import store_and_weight
from spectral_pod.data import byte_store, pipeline, tasks
from spectral_pod.data.drawn import Drawn
from spectral_pod.data.local_copies import LocalCopies
from spectral_pod.data.mixture import Mixture
from spectral_pod.data.windows import Windows
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.objectives import BY_NAME, Objective
from spectral_pod.parallel import runtime


class Sources(NamedTuple):
    """The data of a run.

    Attributes:
      stores: by name; none where examples are drawn.
      weights: of the stores, in training.
      objective: of the task.
      num_classes: of the logits.
      vocab_size: rows of the embedding.
      classes: their names; empty where labels are symbols.
      digest: changes whenever the data do.
      provenance: what the task says of where they come from; of a single store.
    """

    config: ConfigDict
    stores: dict[str, byte_store.ByteStore]
    weights: list[float]
    objective: type[Objective]
    num_classes: int
    vocab_size: int
    classes: list[str]
    digest: str
    provenance: dict[str, Any]

    def training(self) -> pipeline.Source:
        """Shuffled batches without end; of several stores, mixed by their weights."""
        sources = list(self._of_split("train", self.config.train.global_batch_size, shuffle=True))
        return sources[0] if len(sources) == 1 else Mixture(sources, self.weights)

    def evaluation(self, split: str) -> dict[str, pipeline.Source]:
        """Ordered batches that cover a split of each store once, by the name of the store."""
        sources = self._of_split(split, self.config.train.eval_batch_size, shuffle=False)
        return dict(zip(self.stores or [self.config.data.task], sources, strict=True))

    def _of_split(self, split: str, batch_size: int, *, shuffle: bool) -> Iterator[pipeline.Source]:
        data, train = self.config.data, self.config.train
        seed = self.config.seed if shuffle else None
        limit = data.train_records if split == "train" else 0
        if not self.stores:
            yield Drawn(
                tasks.TASKS[data.task],
                split,
                batch_size=batch_size,
                seq_len=data.seq_len,
                seed=self.config.seed,
                options=data.options.to_dict(),
                num_records=limit if split == "train" else train.eval_records,
                repeat=shuffle,
            )
        for store in self.stores.values():
            if self.objective.is_language_model:
                yield Windows(
                    store.split(split),
                    batch_size=batch_size,
                    seq_len=data.seq_len,
                    num_documents=limit,
                    shuffle_seed=seed,
                )
            else:
                yield pipeline.Batches(
                    store.split(split),
                    batch_size=batch_size,
                    seq_len=data.seq_len,
                    documents=data.documents,
                    truncate=data.truncate,
                    num_records=limit,
                    shuffle_seed=seed,
                )


def open_sources(config: ConfigDict) -> Sources:
    """The data of the configured task; a store is written first, by the leader, if there is none.

    Raises:
      UserError: the task does not have these options, its data cannot be read, or stores do not
        belong together.
    """
    name, options = config.data.task, config.data.options.to_dict()
    task = tasks.TASKS[name]
    stores: dict[str, byte_store.ByteStore] = {}
    weights = [1.0]
    if tasks.is_drawn(name):
        tasks.check_options(name, options)
        digest = tasks.drawn_digest(name, options)
    elif config.data.stores:
        stores, weights = _open_stores(config)
        digest = _digest(stores, weights)
    else:
        stores = {name: _open_own_store(config)}
        digest = stores[name].digest
    first = next(iter(stores.values()), None)
    objective = BY_NAME[task.OBJECTIVE]
    labelled = first is not None and not objective.by_position
    return Sources(
        config,
        stores,
        weights,
        objective,
        # A store knows which classes there really are.
        len(first.classes) if first and labelled else task.num_classes(**options),
        task.vocab_size(**options),
        first.classes if first and labelled else [],
        digest,
        first.manifest["provenance"] if first and len(stores) == 1 else {},
    )


def _open_stores(config: ConfigDict) -> tuple[dict[str, byte_store.ByteStore], list[float]]:
    stores: dict[str, byte_store.ByteStore] = {}
    weights: list[float] = []
    copies = _copies(config)
    for entry in config.data.stores:
        path, weight = store_and_weight(entry)
        path = path if storage.is_remote(path) else os.path.expanduser(path)
        storage.check_access(path, write=False)
        name = path.rstrip("/").rpartition("/")[2]
        store = byte_store.ByteStore(path, copies=copies)
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


def _copies(config: ConfigDict) -> LocalCopies | None:
    limit = int(config.data.copies_gb * 1e9)
    return LocalCopies(config.data.copies_dir, limit) if limit else None


def _few(classes: list[str]) -> str:
    return ", ".join(classes[:8]) + (f", ... ({len(classes)})" if len(classes) > 8 else "")


def _digest(stores: dict[str, byte_store.ByteStore], weights: list[float]) -> str:
    if len(stores) == 1:
        return next(iter(stores.values())).digest
    held = [[store.digest, weight] for store, weight in zip(stores.values(), weights, strict=True)]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def _open_own_store(config: ConfigDict) -> byte_store.ByteStore:
    options = config.data.options.to_dict()
    path = tasks.store_path(config.data.dir, config.data.task, options)
    storage.check_access(path, write=False)
    if runtime.is_leader() and not byte_store.exists(path):
        storage.check_access(path, write=True)
        runtime.print_once(f"writing the {config.data.task} data to {path}")
        tasks.TASKS[config.data.task].build(path, **options)
    runtime.barrier("data store")
    if not byte_store.exists(path):
        raise DataError(
            f"process {jax.process_index()} does not see the store {path} that process 0 wrote; "
            "set config.data.dir to a folder or gs:// URL that all hosts share"
        )
    store = byte_store.ByteStore(path, copies=_copies(config))
    tasks.check_store(config.data.task, store, options)
    return store
