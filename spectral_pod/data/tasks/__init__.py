"""Tasks by name. A task is one function that writes its records to a byte store.

    build(path: str, *, seed: int, ...) -> None

Its keyword arguments are the fields of `config.data.options`.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from spectral_pod.data.tasks import content_type, listops
from spectral_pod.errors import ConfigError

TASKS: dict[str, Callable[..., None]] = {
    "content_type": content_type.build,
    "listops": listops.build,
}


def store_path(directory: str, task: str, options: Mapping[str, Any]) -> str:
    """Where the store of a task with these options is kept: `DIRECTORY/TASK-<hash of options>`.

    Raises:
      ConfigError: the task has no such option; names those it has.
    """
    known = [name for name in inspect.signature(TASKS[task]).parameters if name != "path"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"config.data.options.{unknown[0]} is unknown to {task}; it has {known}")
    key = hashlib.sha256(json.dumps(dict(options), sort_keys=True).encode()).hexdigest()[:8]
    if not directory.startswith("gs://"):
        directory = os.path.expanduser(directory)
    return f"{directory.rstrip('/')}/{task}-{key}"
