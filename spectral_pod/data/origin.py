"""The identity of the user's files that a store was written from, recorded in its manifest.

    facts = origin.describe(formats.files(source))      # goes into the store's provenance
    origin.check(files, facts, "config.data.options.source = 'reviews'", store.path)

Equal sizes and modification times show at once that nothing has changed. Otherwise the contents are
compared, for sources of up to ten gigabytes: files may be copied, moved together, or rewritten.
"""

import hashlib
import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from spectral_pod.data import formats
from spectral_pod.errors import DataError

_HASHED_BYTES = 10_000_000_000  # larger sources are identified by sizes and times alone


def describe(files: Sequence[str]) -> dict[str, Any]:
    """The number of files, their total size in bytes, and the digests that `check` compares.

    Raises:
      DataError: a file cannot be read.
    """
    size = sum(formats.size_and_time(file)[0] for file in files)
    return {
        "files": len(files),
        "bytes": size,
        "times": _times(files),
        "sha256": _contents(files) if size <= _HASHED_BYTES else None,
    }


def on_this_host(source: str) -> list[str]:
    """The files of a source, from `formats.files`, or none if it is not on this host."""
    try:
        return formats.files(source)
    except DataError:
        return []


def check(files: Sequence[str], described: Any, what: str, store: str) -> None:
    """Checks that files are those from which `store` was written.

    Without files nothing is checked, as reading a store does not need them.

    Args:
      files: the files now.
      described: the result of `describe` when the store was written, from its manifest.
      what: names the source, as the start of the message.
      store: the path of the store.

    Raises:
      DataError: the files have changed since, or the manifest does not say what they were.
    """
    if not isinstance(described, Mapping) or not {"times", "sha256"} <= described.keys():
        raise DataError(
            f"{store}/manifest.json does not say from which files it was written; delete the store"
        )
    if not files or _times(files) == described["times"]:
        return
    if not described["sha256"] or _contents(files) != described["sha256"]:
        raise DataError(
            f"{what} has changed since {store} was written from it; delete that store to train on "
            "the new contents, or restore the old ones"
        )


def _times(files: Sequence[str]) -> str:
    """The sha256 of the names, sizes and modification times of files."""
    entries = [(name, *formats.size_and_time(file)) for file, name in _with_relative_paths(files)]
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def _contents(files: Sequence[str]) -> str:
    """The sha256 of the output of `sha256sum` in the folder that contains all files."""
    listing = hashlib.sha256()
    for file, name in _with_relative_paths(files):
        listing.update(os.fsencode(f"{formats.sha256(file)}  {name}\n"))
    return listing.hexdigest()


def _with_relative_paths(files: Sequence[str]) -> list[tuple[str, str]]:
    """Each file with its path relative to their common folder."""
    folder = posixpath.commonpath([posixpath.dirname(file) for file in files])
    return [(file, posixpath.relpath(file, folder)) for file in files]
