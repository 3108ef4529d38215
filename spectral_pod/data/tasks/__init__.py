"""Tasks by name. A task is a module with a function that writes its records to a byte store,

    build(path: str, *, seed: int = 0, ...) -> None

whose keyword arguments are the fields of `config.data.options`, and a `VERSION`, raised when the
same options come to mean other records: stores of another version are not used.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

from spectral_pod.data.tasks import content_type, listops
from spectral_pod.errors import ConfigError

TASKS: dict[str, Any] = {"content_type": content_type, "listops": listops}


def store_path(directory: str, task: str, options: Mapping[str, Any]) -> str:
    """Where the store of a task with these options is kept: `DIRECTORY/TASK-<hash>`.

    Raises:
      ConfigError: the task has no such option; names those it has.
    """
    known = list(inspect.signature(TASKS[task].build).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"config.data.options.{unknown[0]} is unknown to {task}; it has {known}")
    meaning = json.dumps([TASKS[task].VERSION, dict(options)], sort_keys=True)
    key = hashlib.sha256(meaning.encode()).hexdigest()[:8]
    if not directory.startswith("gs://"):
        directory = os.path.expanduser(directory)
    return f"{directory.rstrip('/')}/{task}-{key}"
