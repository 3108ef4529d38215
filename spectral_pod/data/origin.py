"""The user's files that a store was written from: noted in its manifest, and known again by that.

    facts = origin.describe(formats.files(source))      # goes into the store's provenance
    origin.check(files, facts, "config.data.options.source = 'reviews'", store.path)

Sizes and times tell at once that nothing has changed. Where they differ the contents decide, up to
ten gigabytes of them: files may be copied, moved together, or written again.
"""

import hashlib
import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from spectral_pod.data import formats
from spectral_pod.errors import DataError

_HASHED_BYTES = 10_000_000_000  # larger sources are known by the sizes and times of their files


def describe(files: Sequence[str]) -> dict[str, Any]:
    """How many files there are, their bytes, and what `check` knows them by.

    Raises:
      DataError: one cannot be read.
    """
    size = sum(formats.size_and_time(file)[0] for file in files)
    return {
        "files": len(files),
        "bytes": size,
        "times": _times(files),
        "sha256": _contents(files) if size <= _HASHED_BYTES else None,
    }


def on_this_host(source: str) -> list[str]:
    """The files of a source, as `formats.files`; none where there is no such thing."""
    try:
        return formats.files(source)
    except DataError:
        return []


def check(files: Sequence[str], described: Mapping[str, Any], what: str, store: str) -> None:
    """Compares files with those that were described when `store` was written from them.

    Where there are none nothing is compared: a store does not need them.

    Raises:
      DataError: they have changed since; begins with `what`.
    """
    if not files or _times(files) == described["times"]:
        return
    if not described["sha256"] or _contents(files) != described["sha256"]:
        raise DataError(
            f"{what} has changed since {store} was written from it; delete that store to train on "
            "the new contents, or restore the old ones"
        )


def _times(files: Sequence[str]) -> str:
    """sha256 of the names, sizes and times of files."""
    known = [(name, *formats.size_and_time(file)) for file, name in _named(files)]
    return hashlib.sha256(repr(known).encode()).hexdigest()


def _contents(files: Sequence[str]) -> str:
    """sha256 of what `sha256sum` prints about files, in the folder that holds them all."""
    listing = hashlib.sha256()
    for file, name in _named(files):
        listing.update(os.fsencode(f"{formats.sha256(file)}  {name}\n"))
    return listing.hexdigest()


def _named(files: Sequence[str]) -> list[tuple[str, str]]:
    """Each file with what of its path stays when all are moved."""
    folder = posixpath.commonpath([posixpath.dirname(file) for file in files])
    return [(file, posixpath.relpath(file, folder)) for file in files]
