"""Tasks by name. A task is a module with

    VERSION                     raised when the same options come to mean other examples, or when
                                `check` needs to know more of what they are from
    OBJECTIVE                   "class": one label a record
                                "next": the byte that follows, everywhere in a stream of documents
                                "positions": labels at some positions of an example
    num_classes(**options)      the most classes that there can be
    vocab_size(**options)       rows of the embedding

and either a function that writes its records, once, to a byte store,

    build(path: str, *, seed: int = 0, ...) -> None
    check(store, **options)     where they come from a user's files: do these still hold the same?

or, with the objective "positions", a function that draws one example, which nobody stores,

    draw(rng: np.random.Generator, ...) -> tokens, labels
                                int32 [n] each; label -1 where a position is not scored
    max_length(**options)       the most tokens that an example can have; checks the options

The keyword arguments of `build` or `draw` are the fields of `config.data.options`; every other
function takes the same.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from spectral_pod import storage
from spectral_pod.data.byte_store import FORMAT, ByteStore
from spectral_pod.data.tasks import (
    content_type,
    copy,
    dna,
    listops,
    lm,
    mqar,
    overwrite,
    pathfinder,
    recall,
    records,
    retrieval,
)
from spectral_pod.errors import ConfigError

TASKS: dict[str, Any] = {
    "content_type": content_type,
    "listops": listops,
    "pathfinder": pathfinder,
    "retrieval": retrieval,
    "dna": dna,
    "records": records,
    "lm": lm,
    "copy": copy,
    "recall": recall,
    "overwrite": overwrite,
    "mqar": mqar,
}
_NUM_SAMPLES = 8


def is_drawn(task: str) -> bool:
    """Whether the task's examples are drawn where they are needed, and not kept in a store."""
    return hasattr(TASKS[task], "draw")


def check_options(task: str, options: Mapping[str, Any]) -> None:
    """Checks the options of a task, as far as that is possible without its data.

    Raises:
      ConfigError: the task has no such option (names those it has), or cannot draw with them.
    """
    module = TASKS[task]
    function = module.draw if is_drawn(task) else module.build
    known = list(inspect.signature(function).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"config.data.options.{unknown[0]} is unknown to {task}; it has {known}")
    if is_drawn(task):
        module.max_length(**options)


def store_path(directory: str, task: str, options: Mapping[str, Any]) -> str:
    """Where the store of a task with these options is kept: `DIRECTORY/TASK-<hash>`.

    Raises:
      ConfigError: the task has no such option; names those it has.
    """
    check_options(task, options)
    key = hashlib.sha256(FORMAT.encode() + _meaning(task, options)).hexdigest()[:8]
    if not storage.is_remote(directory):
        directory = os.path.expanduser(directory)
    return f"{directory.rstrip('/')}/{task}-{key}"


def check_store(task: str, store: ByteStore, options: Mapping[str, Any]) -> None:
    """Compares a store with the user's files that it was written from, if any.

    Raises:
      DataError: they have changed since.
    """
    if hasattr(TASKS[task], "check"):
        TASKS[task].check(store, **options)


def drawn_digest(task: str, options: Mapping[str, Any]) -> str:
    """sha256 of what a drawn task is: its version, its options, and a few examples.

    The examples tell where another version of NumPy draws other numbers from a seed.
    """
    digest = hashlib.sha256(_meaning(task, options))
    for i in range(_NUM_SAMPLES):
        for array in TASKS[task].draw(np.random.default_rng(i), **options):
            digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()


def _meaning(task: str, options: Mapping[str, Any]) -> bytes:
    return json.dumps([TASKS[task].VERSION, dict(options)], sort_keys=True).encode()
