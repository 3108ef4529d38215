"""Content type: what kind of file do these bytes come from? The quickstart task: no download.

The records are windows of real files that every installation has: the interpreter's own library
and headers, and its site-packages. What is installed decides which kinds there are and how many
records each has; one installation and one seed always give the same records.

- No file is in two splits, files of equal content count once, and a Python source shares its split
  with its bytecode and its deflated form. Equal windows occur once. Files that differ a little,
  such as two versions of one licence, are different files.
- Windows start at random offsets spread over the file, so few hold a header or a magic number. A
  file shorter than the window is one short record.
"""

import dataclasses
import fnmatch
import hashlib
import importlib.util
import io
import os
import pickle
import platform
import re
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from spectral_pod.data import byte_store
from spectral_pod.data.tasks.task import StoredTask
from spectral_pod.errors import DataError
from spectral_pod.fields import Positive
from spectral_pod.seeds import entropy

SPLITS = ("train", "validation", "test")
MIN_KINDS = 8
_MIN_FILLED = 0.4  # a kind that fills less than this part of a split is left out
_MIN_FILE_BYTES = 256
_MAX_SHARE = 8  # no file gives more than one part in this many of a split
_SPARE = 1.25  # read files for this many times the windows needed: some turn out to be equal
_SAMPLED_FROM, _BLOCKS, _BLOCK_BYTES = 1 << 20, 64, 4096  # see `_identity`

_COMPILER = """
import marshal, pickle, sys, warnings
warnings.simplefilter("ignore")
def compiled(name, source):
    try:
        code = compile(source, name, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError, RecursionError):  # parsers come with broken test files
        return None
    return marshal.dumps(code)
jobs = pickle.load(sys.stdin.buffer)
pickle.dump([compiled(*job) for job in jobs], sys.stdout.buffer)
"""


class File(NamedTuple):
    """A file of the installation, or the form derived from one: then `content` holds its bytes."""

    path: str
    name: str  # relative to its root, so the same wherever the installation is
    size: int
    digest: bytes = b""  # identifies the file of the installation, also for derived forms
    content: bytes | None = None


def bytecode(sources: Sequence[File]) -> list[File]:
    """The `.pyc` of every source that compiles; not every installer leaves them on disk.

    A bare interpreter compiles them: the bytes depend on which strings the process has interned,
    and so on what it has imported.
    """
    contents = [_read(source) for source in sources]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _COMPILER],
        input=pickle.dumps([(s.name, c) for s, c in zip(sources, contents, strict=True)]),
        stdout=subprocess.PIPE,
        check=True,
    )
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little")  # PEP 552: unchecked hash
    return [
        _derived(source, header + importlib.util.source_hash(content) + code)
        for source, content, code in zip(sources, contents, pickle.loads(done.stdout), strict=True)
        if code is not None
    ]


def deflated(sources: Sequence[File]) -> list[File]:
    """Every source as zlib compresses it: what wheels and other zip files hold."""
    return [_derived(source, zlib.compress(_read(source))) for source in sources]


# Kind -> names of its files, or how it is derived from the Python sources. First match counts.
KINDS: dict[str, tuple[str, ...] | Callable[[Sequence[File]], list[File]]] = {
    "python": ("*.py",),
    "bytecode": bytecode,
    "deflate": deflated,
    "library": ("*.so", "*.so.*", "*.dylib", "*.pyd", "*.dll"),
    "c": ("*.h", "*.hh", "*.hpp", "*.inc", "*.c", "*.cc", "*.cpp", "*.cu", "*.cuh"),
    "text": ("*.md", "*.rst", "METADATA"),
    "record": ("RECORD",),
    "array": ("*.npy", "*.mat", "*.sav", "*.nc", "*.wav", "*.au"),
    "table": ("*.csv", "*.tsv"),
    "cython": ("*.pyx", "*.pxd", "*.pxi"),
    "proto": ("*.proto",),
    "json": ("*.json", "*.ipynb"),
    "html": ("*.html", "*.xml", "*.svg"),
    "javascript": ("*.js", "*.mjs", "*.ts"),
}


@dataclasses.dataclass(frozen=True)
class ContentType(StoredTask):
    """Windows of files; the class is the kind of file."""

    name = "content_type"
    version = 1
    num_classes = len(KINDS)  # at most: a store leaves out kinds with too few files

    seed: int = 0  # draws files, splits and offsets
    window: Positive = 2048  # bytes in a record, fewer where the whole file is shorter
    # Training records of each kind; validation and test have an eighth each.
    windows_per_class: Positive = 1000
    max_windows_per_file: Positive = 32  # at most an eighth of its split, too
    roots: tuple[str, ...] = ()  # folders to search instead of the running interpreter's own

    def build(self, path: str) -> None:
        """Writes the task as a byte store, with its splits train, validation and test.

        A kind that cannot fill 40% of every split is left out; the manifest says so.

        Raises:
          DataError: fewer than `MIN_KINDS` kinds remain; says what was found where.
        """
        started = time.monotonic()
        held_out = max(1, self.windows_per_class // 8)
        quotas = dict(zip(SPLITS, (self.windows_per_class, held_out, held_out), strict=True))
        roots = self.roots or _interpreter_roots()
        found = {root: _scan(root) for root in roots}
        drawn = _draw_kinds(
            found, _Sampler(self.seed, self.window, self.max_windows_per_file, quotas)
        )
        left_out = {
            kind: f"fills only {[len(held[s]) for s in SPLITS]} of {list(quotas.values())} windows"
            for kind, held in drawn.items()
            if any(len(held[s]) < _MIN_FILLED * quotas[s] for s in SPLITS)
        }
        for kind, reason in left_out.items():
            logging.info("Left out %s: it %s", kind, reason)
        classes = [kind for kind in KINDS if kind not in left_out]
        census = {root: {kind: len(f) for kind, f in found[root].items()} for root in roots}
        if len(classes) < MIN_KINDS:
            raise DataError(
                f"content_type needs {MIN_KINDS} kinds of files and has {len(classes)}: {classes}. "
                f"Files found: {census}. Left out: {left_out}. "
                "Install more packages, ask for fewer windows_per_class, or name other roots."
            )
        rng = np.random.default_rng(entropy(self.seed))
        splits = {}
        for split in SPLITS:
            records = [
                byte_store.Record(w.data, label)
                for label, kind in enumerate(classes)
                for w in drawn[kind][split]
            ]
            splits[split] = [records[i] for i in rng.permutation(len(records))]
        provenance = {
            "task": "content_type",
            "python": platform.python_version(),
            **self.identity(),
            "roots": list(roots),
            "files_found": census,
            "windows": {k: {s: len(drawn[k][s]) for s in SPLITS} for k in classes},
            "files": {k: {s: len({w.file for w in drawn[k][s]}) for s in SPLITS} for k in classes},
            "left_out": left_out,
        }
        byte_store.write(path, splits, classes=classes, provenance=provenance)
        logging.info("Content type with kinds %s in %.1f s", classes, time.monotonic() - started)


class _Window(NamedTuple):
    data: bytes
    file: bytes  # digest of the file it is from


def _draw_kinds(
    found: Mapping[str, Mapping[str, Sequence[File]]], sampler: "_Sampler"
) -> dict[str, dict[str, list[_Window]]]:
    """Windows of every kind by split; `found` are the files of each kind below each root."""
    drawn: dict[str, dict[str, list[_Window]]] = {}
    sources: list[File] = []
    for kind, how in KINDS.items():
        if callable(how):
            files = how(sources)
        else:
            files = sampler.distinct([f for kinds in found.values() for f in kinds.get(kind, ())])
        if kind == "python":
            sources = files
        drawn[kind] = sampler.draw(files)
        counts = {split: len(windows) for split, windows in drawn[kind].items()}
        logging.info("%-10s %5d files read, windows %s", kind, len(files), counts)
    return drawn


class _Sampler:
    """Draws windows kind by kind, and remembers across kinds what may not occur twice."""

    def __init__(self, seed: int, window: int, max_per_file: int, quotas: dict[str, int]):
        self._seed, self._window, self._max_per_file = seed, window, max_per_file
        self._quotas = quotas
        self._files: set[bytes] = set()
        self._windows: set[bytes] = set()
        self._split_of: dict[bytes, str] = {}

    def distinct(self, files: Sequence[File]) -> list[File]:
        """As many files as the quotas need, in random order, each content once."""

        def order(file: File) -> bytes:
            return hashlib.blake2b(os.fsencode(f"{self._seed}/{file.name}")).digest()

        per_file, windows, kept = self._per_file(files), 0.0, []
        for file in sorted(files, key=order):
            if windows >= _SPARE * sum(self._quotas.values()):
                break
            digest = _identity(file)
            if digest not in self._files:
                self._files.add(digest)
                kept.append(file._replace(digest=digest))
                windows += min(per_file, self._supply(file))
        return kept

    def draw(self, files: Sequence[File]) -> dict[str, list[_Window]]:
        """Windows for every split, from as many files as possible.

        A file whose split is open goes to the one that is emptiest relative to its quota, so the
        splits of a scarce kind keep their proportions.
        """
        drawn: dict[str, list[_Window]] = {split: [] for split in SPLITS}
        per_file = self._per_file(files)
        for file in files:
            fill = {s: len(drawn[s]) / self._quotas[s] for s in SPLITS}
            emptiest = min(fill, key=fill.__getitem__)
            if fill[emptiest] >= 1:
                break
            split = self._split_of.setdefault(file.digest, emptiest)
            quota = self._quotas[split]
            count = min(per_file, self._supply(file), max(1, quota // _MAX_SHARE))
            for data in self._cut(file, count):
                if data not in self._windows and len(drawn[split]) < quota:
                    self._windows.add(data)
                    drawn[split].append(_Window(data, file.digest))
        return drawn

    def _supply(self, file: File) -> int:
        """Windows that a file can give, so that no byte is drawn more than about twice."""
        return 1 + max(0, 2 * (file.size - self._window) // self._window)

    def _per_file(self, files: Sequence[File]) -> int:
        """The fewest windows a file that fill the quotas: many files beat many windows of few."""
        supplies = np.array([self._supply(file) for file in files])
        wanted = _SPARE * sum(self._quotas.values())
        for per_file in range(1, self._max_per_file):
            if np.minimum(supplies, per_file).sum() >= wanted:
                return per_file
        return self._max_per_file

    def _cut(self, file: File, count: int) -> list[bytes]:
        """`count` windows: one at a random offset in each of `count` equal parts of the file."""
        rng = np.random.default_rng(
            [entropy(self._seed), int.from_bytes(file.digest[:8], "little")]
        )
        offsets = max(1, file.size - self._window + 1)
        starts = (np.arange(count) + rng.random(count)) * offsets / count
        return [_read(file, int(start), self._window) for start in starts]


def _interpreter_roots() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib", "include")
    return tuple(dict.fromkeys(os.path.realpath(sysconfig.get_path(name)) for name in names))


def _scan(root: str) -> dict[str, list[File]]:
    """The files of every kind below `root`, in order of their names.

    Site-packages inside the root are a root of their own, or those of another environment.
    """
    patterns = {
        kind: re.compile("|".join(map(fnmatch.translate, how)))
        for kind, how in KINDS.items()
        if not callable(how)
    }
    found: dict[str, list[File]] = {}
    for folder, subfolders, names in os.walk(root):
        skipped = {"__pycache__", "site-packages", "dist-packages"}
        subfolders[:] = sorted(set(subfolders) - skipped)
        for name in sorted(names):
            kind = next((k for k, pattern in patterns.items() if pattern.match(name)), None)
            path = os.path.join(folder, name)
            if kind is None or not os.path.isfile(path):
                continue
            size = os.path.getsize(path)
            if size >= _MIN_FILE_BYTES:
                relative = os.path.relpath(path, root).replace(os.sep, "/")
                found.setdefault(kind, []).append(File(path, relative, size))
    return found


def _identity(file: File) -> bytes:
    """Digest of the content; for a large file, of its size and 64 blocks spread over it."""
    if file.size <= _SAMPLED_FROM:
        return hashlib.blake2b(_read(file)).digest()
    digest = hashlib.blake2b(str(file.size).encode())
    for start in np.linspace(0, file.size - _BLOCK_BYTES, _BLOCKS).astype(int):
        digest.update(_read(file, int(start), _BLOCK_BYTES))
    return digest.digest()


def _read(file: File, start: int = 0, count: int = -1) -> bytes:
    with open(file.path, "rb") if file.content is None else io.BytesIO(file.content) as stream:
        stream.seek(start)
        return stream.read(count)


def _derived(source: File, content: bytes) -> File:
    return source._replace(size=len(content), content=content)
