"""Where a run's batches come from: a byte store that is written once, or examples drawn anew."""

from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from spectral_pod import storage
from spectral_pod.data import byte_store, pipeline, tasks
from spectral_pod.data.drawn import Drawn
from spectral_pod.data.windows import Windows
from spectral_pod.errors import DataError
from spectral_pod.parallel import runtime


class Sources(NamedTuple):
    """The data of a run.

    Attributes:
      objective: 'class', 'next' or 'positions', see `data/tasks`.
      num_classes: of the logits.
      vocab_size: rows of the embedding.
      classes: their names; empty where labels are symbols.
      digest: changes whenever the data do.
      provenance: what the task says of where they come from.
    """

    config: ConfigDict
    store: byte_store.ByteStore | None
    objective: str
    num_classes: int
    vocab_size: int
    classes: list[str]
    digest: str
    provenance: dict[str, Any]

    def batches(self, split: str, *, shuffle: bool = False) -> pipeline.Source:
        """Shuffled batches without end for training, or ordered ones that cover a split once."""
        data, train = self.config.data, self.config.train
        batch_size = train.global_batch_size if shuffle else train.eval_batch_size
        seed = self.config.seed if shuffle else None
        limit = data.train_records if split == "train" else 0
        if self.store is None:
            return Drawn(
                tasks.TASKS[data.task],
                split,
                batch_size=batch_size,
                seq_len=data.seq_len,
                seed=self.config.seed,
                options=data.options.to_dict(),
                num_records=limit if split == "train" else train.eval_records,
                repeat=shuffle,
            )
        if self.objective == "next":
            return Windows(
                self.store.split(split),
                batch_size=batch_size,
                seq_len=data.seq_len,
                num_documents=limit,
                shuffle_seed=seed,
            )
        return pipeline.Batches(
            self.store.split(split),
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
      UserError: the task does not have these options, or its data cannot be read.
    """
    name, options = config.data.task, config.data.options.to_dict()
    task = tasks.TASKS[name]
    store = None
    if tasks.is_drawn(name):
        tasks.check_options(name, options)
        digest = tasks.drawn_digest(name, options)
    else:
        store = _open_store(config)
        digest = store.digest
    labelled = store is not None and task.OBJECTIVE == "class"
    return Sources(
        config,
        store,
        task.OBJECTIVE,
        # A store knows which classes there really are.
        len(store.classes) if store and labelled else task.num_classes(**options),
        task.vocab_size(**options),
        store.classes if store and labelled else [],
        digest,
        store.manifest["provenance"] if store else {},
    )


def _open_store(config: ConfigDict) -> byte_store.ByteStore:
    options = config.data.options.to_dict()
    path = tasks.store_path(config.data.dir, config.data.task, options)
    storage.check_access(path, write=False)
    if runtime.is_leader() and not byte_store.exists(path):
        storage.check_access(path, write=True)
        runtime.say(f"writing the {config.data.task} data to {path}")
        tasks.TASKS[config.data.task].build(path, **options)
    runtime.barrier("data store")
    if not byte_store.exists(path):
        raise DataError(
            f"process {jax.process_index()} does not see the store {path} that process 0 wrote; "
            "set config.data.dir to a folder or gs:// URL that all hosts share"
        )
    store = byte_store.ByteStore(path)
    tasks.check_store(config.data.task, store, options)
    return store
