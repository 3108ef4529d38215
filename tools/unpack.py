"""Restores a run that `python -m tools.pack` has packed; the trainer then goes on with it.

    python -m tools.unpack DIR --workdir=WORKDIR

DIR and WORKDIR are folders or gs:// URLs; WORKDIR must be empty or absent. All parts are compared
with their sha256 before anything is written. An unpack that is interrupted leaves a folder without
config.json, which is no run, and the same command starts again.
"""

import argparse
import hashlib
import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from spectral_pod import errors, lease, project_files, storage
from spectral_pod.errors import ConfigError, DataError

from . import shell
from .pack import MANIFEST

# Neither JAX nor Orbax is imported here, directly or indirectly: they take seconds.

_MARK = "UNPACKING"  # a file in a workdir that is being restored


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("unpack", __doc__)
    parser.add_place("pack", metavar="DIR", help="with manifest.json and all parts")
    parser.add_place("--workdir", required=True, metavar="WORKDIR", help="new or empty")
    again = "Interrupted; the same command starts again"
    return shell.run(parser, unpack, argv, interrupted=again)


def unpack(arguments: argparse.Namespace) -> None:
    """Restores a run.

    Raises:
      ConfigError: the workdir holds something.
      DataError: a part is missing or damaged; names it.
      InUseError: another process is using the workdir.
    """
    folder, workdir = epath.Path(arguments.pack), epath.Path(arguments.workdir)
    storage.check_access(arguments.pack, write=False)
    storage.check_access(arguments.workdir, write=True)
    manifest = project_files.PACK.read(folder / MANIFEST)
    _verify(folder, manifest)
    _check_empty(workdir)
    with lease.of_workdir(arguments.workdir, shell.say) as held:
        storage.write_whole(workdir / _MARK, f"the run packed in {folder}\n")
        for name, data in _files(folder, manifest):
            target = workdir / name
            target.parent.mkdir(parents=True, exist_ok=True)
            held.check()
            storage.write_whole(target, data)
        (workdir / _MARK).unlink()
    print(f"step {manifest['step']} of run {manifest['run'][:12]} in {workdir}")


def _verify(folder: Any, manifest: project_files.Pack) -> None:
    """Compares all parts with the manifest.

    Raises:
      DataError: says what is wrong with each part that differs.
    """
    known = {part["sha256"]: part["name"] for part in manifest["parts"]}
    whole, faults = hashlib.sha256(), []
    for part in manifest["parts"]:
        file = folder / part["name"]
        if not file.exists():
            faults.append(f"{file} is missing")
            continue
        with errors.naming(file):
            data = file.read_bytes()
        whole.update(data)
        digest = hashlib.sha256(data).hexdigest()
        if digest == part["sha256"]:
            shell.say(f"{part['name']}  {len(data):,} bytes, sound")
            continue
        if digest in known:
            faults.append(f"{file} has the content of {known[digest]}")
        elif len(data) != part["bytes"]:
            faults.append(f"{file} has {len(data):,} bytes, and had {part['bytes']:,}")
        else:
            faults.append(f"{file} is altered: its sha256 differs")
    if not faults and whole.hexdigest() != manifest["sha256"]:
        faults.append(f"{folder}: the parts are not those of one run")
    if faults:
        raise DataError(f"{'; '.join(faults)}; {project_files.PACK.remedy}")


def _check_empty(workdir: Any) -> None:
    """Raises a ConfigError unless there is nothing, or what an interrupted unpack left."""
    paths = workdir.iterdir() if workdir.exists() else ()
    names = {path.name for path in paths if not path.name.startswith("lease.json")}
    is_unfinished = names & {_MARK, f"{_MARK}.tmp"} and "config.json" not in names
    if names and not is_unfinished:
        what = "a run" if "config.json" in names else f"{sorted(names)[0]!r}"
        raise ConfigError(f"--workdir={workdir} holds {what}; give a new or an empty folder")


def _files(folder: Any, manifest: project_files.Pack) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the archive's files, in its order: config.json is the last."""
    try:
        with tarfile.open(fileobj=_Joined(folder, manifest), mode="r|") as archive:
            for info in archive:
                reader = archive.extractfile(info) if info.isreg() else None
                if reader is None or not storage.stays_inside(info.name):
                    raise DataError(f"{folder} holds {info.name!r}, which is no file of a run")
                yield info.name, reader.read()
    except tarfile.TarError as error:
        raise DataError(
            f"{folder} holds no archive of a run ({error}); {project_files.PACK.remedy}"
        ) from error


class _Joined(io.RawIOBase):
    """All parts in a row, for `tarfile` to read."""

    def __init__(self, folder: Any, manifest: project_files.Pack):
        self._files = iter([folder / part["name"] for part in manifest["parts"]])
        self._left = memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not self._left:
                file = next(self._files, None)
                if file is None:
                    break
                with errors.naming(file):
                    self._left = memoryview(file.read_bytes())
            taken = self._left[: size - len(data)]
            data += taken
            self._left = self._left[len(taken) :]
        return bytes(data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
