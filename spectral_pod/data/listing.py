"""The files of a folder or of a glob on disk, with links followed."""

import itertools
import os
import re
from collections.abc import Callable, Iterator

from fsspec.utils import glob_translate

from spectral_pod.errors import DataError

# Hidden names, and what Spark and Databricks write beside the data.
_LEFT_OUT = re.compile(
    r"\..*|.*\.crc|_SUCCESS|_(started|committed)_.*|_(common_|spark_)?metadata|_temporary"
)


def is_left_out(relative: str) -> bool:
    """Whether a path below a folder has a hidden name in it, or one of what Spark adds to data.

    Raises:
      DataError: the path is of a Delta table, whose folder also has what has been deleted.
    """
    parts = relative.split("/")
    if "_delta_log" in parts:
        raise DataError(
            f"{relative} belongs to a Delta table, whose files are not all current; export it"
        )
    return any(map(_LEFT_OUT.fullmatch, parts))


def in_folder(folder: str) -> list[str]:
    """The files below a folder, those that are left out aside, in no order.

    Raises:
      OSError: a folder cannot be read.
      DataError: a link is broken or leads to a folder that it is in, or there is a device.
    """
    found = [p for p in _walk(folder, None) if not is_left_out(os.path.relpath(p, folder))]
    return list(map(_checked, found))


def matching(pattern: str) -> list[str]:
    """The files that match a glob, an absolute path, in no order.

    `*`, `?` and `[a-z]` stand for parts of a name, `**` for any folders.

    Raises:
      OSError, DataError: as `in_folder`.
    """
    root, wild = _parts(pattern)
    if not os.path.isdir(root):
        return []
    matches = re.compile(glob_translate(pattern)).match
    paths = filter(matches, _walk(root, None if "**" in wild else wild.count("/")))
    return list(map(_checked, filter(is_meant(pattern), paths)))


def is_meant(pattern: str) -> Callable[[str], bool]:
    """Whether a path that matches a glob is meant by it: what a folder leaves out is only if a name
    in the glob starts with a dot or an underscore.
    """
    root, wild = _parts(pattern)
    is_spelt = any(part.startswith((".", "_")) for part in wild.split("/"))
    return lambda path: is_spelt or not is_left_out(os.path.relpath(path, root))


def _parts(pattern: str) -> tuple[str, str]:
    """The folder below which the paths of a glob are, and the rest of it."""
    root = os.path.dirname(re.split(r"[*?[]", pattern)[0])
    return root, os.path.relpath(pattern, root)


def _walk(folder: str, depth: int | None) -> Iterator[str]:
    """Every path below a folder that is no folder itself; those in hidden folders are left out.

    Args:
      folder: a path.
      depth: of folders below it, also through links to folders above; None for all.
    """
    real = os.path.realpath(folder)
    parents = itertools.accumulate(real.split("/"), lambda parent, name: f"{parent}/{name}")
    todo = [(folder, frozenset(_identity(f"{parent}/") for parent in parents), 0)]
    while todo:
        folder, above, level = todo.pop()
        with os.scandir(folder) as entries:
            paths = [entry.path for entry in entries]
        for path in paths:
            if not os.path.isdir(path):
                yield path
            elif depth is not None:
                if level < depth:
                    todo.append((path, above, level + 1))
            elif not os.path.basename(path).startswith("."):
                if (identity := _identity(path)) in above:
                    raise DataError(
                        f"{path} is a link to {os.readlink(path)}, a folder that it is in; remove "
                        "the link"
                    )
                todo.append((path, above | {identity}, level + 1))


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _checked(path: str) -> str:
    if os.path.isfile(path):
        return path
    if not os.path.islink(path):
        raise DataError(f"{path} is neither a file nor a folder; name the files that are meant")
    target = os.readlink(path)
    raise DataError(f"{path} is a broken link, to {target}; restore what it leads to, or remove it")
