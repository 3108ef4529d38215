"""Packs a run into a few files of a few megabytes, to go on where no disk and no network is shared.

    python -m tools.pack WORKDIR --out=DIR [--part_mb=16] [--keep_best=N]
    python -m tools.unpack DIR --workdir=OTHER_WORKDIR

WORKDIR and DIR are folders or gs:// URLs. Packed is what the run needs to go on and to end as if it
had stayed: config.json, starts.jsonl, metrics.jsonl, the event files, result.json, the id of its
Weights & Biases run, and the newest sound checkpoint with its seal. Without the best checkpoint the
run ends with the same numbers, but cannot keep that one any longer: --keep_best=N adds the N best,
as many as config.checkpoint.keep_best. Compiled programs, traces, reports of stalls, quarantined
checkpoints and what Weights & Biases has not uploaded stay behind, and so do the data. No run can
start in WORKDIR meanwhile.

DIR gets one archive (tar) cut into part-00000, part-00001, ... and manifest.json with the size and
the sha256 of each part and of the whole. The latter is printed; it is the same whenever the same
state of a run is packed. The archive is not compressed, as checkpoints are already.
"""

import argparse
import hashlib
import io
import re
import sys
import tarfile
from collections.abc import Sequence
from typing import Annotated, Any

from etils import epath

from spectral_pod import errors, fields, lease, project_files, storage
from spectral_pod.errors import ConfigError

from . import shell

MANIFEST = "manifest.json"
FORMAT = "spectral_pod.pack/1"
_FILES = ("starts.jsonl", "metrics.jsonl", "result.json", "wandb_run_id.txt")
_SPLITS = ("train", "validation", "test")  # the folders of the event files
_UNFINISHED = re.compile(r"part-\d{5,9}(\.tmp)?|manifest\.json\.tmp")
_PartMb = Annotated[float, fields.Bound(0.001, 4096, "at least 0.001 and below 4096")]


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("pack", __doc__)
    parser.add_place("workdir", help="of the run, which must have stopped")
    parser.add_place("--out", required=True, metavar="DIR", help="new or empty, for the parts")
    parser.add_value("--part_mb", _PartMb, 16.0, "size of a part at most, in 10^6 bytes (16)")
    parser.add_value("--keep_best", fields.NonNegative, 0, "best checkpoints to add (0)")
    again = "Interrupted; the same command starts again"
    return shell.run(parser, pack, argv, interrupted=again)


def pack(arguments: argparse.Namespace) -> None:
    """Packs a run.

    Raises:
      ConfigError: the workdir has no run, or the output folder something else.
      CheckpointError: the run has no sound checkpoint.
      InUseError: the run is going on.
    """
    workdir, out = epath.Path(arguments.workdir), epath.Path(arguments.out)
    storage.check_access(arguments.workdir, write=True)  # for the lease
    storage.check_access(arguments.out, write=True)
    if not (workdir / "config.json").exists():
        raise ConfigError(f"{workdir} is no workdir of a run: it has no config.json")
    with lease.of_workdir(arguments.workdir, shell.say):
        run = project_files.run_id(project_files.RUN.read(workdir / "config.json"))
        steps = _steps(arguments.workdir, run, arguments.keep_best)
        names = _names(workdir, steps)
        _clear(out)
        parts = _Parts(out, int(arguments.part_mb * 1e6))
        with tarfile.open(fileobj=parts, mode="w|", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
            for name in names:
                _add(archive, workdir / name, name)
        manifest = parts.finish() | {"format": FORMAT, "run": run, "step": steps[0]}
    project_files.PACK.write(out / MANIFEST, manifest)
    print(
        f"step {steps[0]} of run {run[:12]}: {manifest['bytes']:,} bytes in "
        f"{len(manifest['parts'])} part(s) in {out}\nsha256 {manifest['sha256']}"
    )


def _steps(workdir: str, run: str, num_best: int) -> list[int]:
    """The newest sound step, and the best ones that are not the same."""
    from spectral_pod.train.sealed_steps import SealedSteps  # imports JAX and Orbax

    sealed = SealedSteps(f"{workdir}/checkpoints", run)
    newest = sealed.choose()
    _, best = sealed.ranked("score")
    return [newest, *(sealed.choose(step) for step in best[:num_best] if step != newest)]


def _names(workdir: Any, steps: Sequence[int]) -> list[str]:
    """The files to pack, in the order in which they are restored.

    A checkpoint counts once it has a seal, and a folder as a workdir once it has a config.json.
    """
    seals = [f"seals/{step}.json" for step in sorted(steps)]
    folders = [f"checkpoints/{step}" for step in steps]
    folders += [split for split in _SPLITS if (workdir / split).exists()]
    names = [name for name in _FILES if (workdir / name).exists()]
    for folder in folders:
        names += [
            path.relative_to(workdir).as_posix() for path in storage.files_below(workdir / folder)
        ]
    return [*sorted(names), *seals, "config.json"]


def _clear(out: Any) -> None:
    """Deletes what an interrupted pack left.

    Raises:
      ConfigError: the folder holds something else.
    """
    files = list(out.iterdir()) if out.exists() else []
    if others := sorted(file.name for file in files if not _UNFINISHED.fullmatch(file.name)):
        raise ConfigError(f"--out={out} holds {others[0]!r}; give a new or an empty folder")
    for file in files:
        file.unlink()
    out.mkdir(parents=True, exist_ok=True)


def _add(archive: tarfile.TarFile, file: Any, name: str) -> None:
    """Adds a file, with nothing but its name, size and content."""
    with errors.naming(file), file.open("rb") as reader:
        info = tarfile.TarInfo(name)
        info.size = reader.seek(0, io.SEEK_END)
        reader.seek(0)
        archive.addfile(info, reader)


class _Parts:
    """A file for `tarfile` to write, which is cut into parts."""

    def __init__(self, folder: Any, size: int):
        self._folder, self._size = folder, size
        self._held = bytearray()
        self._whole = hashlib.sha256()
        self._parts: list[project_files.PackPart] = []

    def write(self, data: bytes) -> int:
        self._whole.update(data)
        self._held += data
        while len(self._held) >= self._size:
            self._write()
        return len(data)

    def finish(self) -> dict[str, Any]:
        """Writes the last part; returns the manifest's facts about all of them."""
        if self._held:
            self._write()
        size = sum(part["bytes"] for part in self._parts)
        return {"bytes": size, "sha256": self._whole.hexdigest(), "parts": self._parts}

    def _write(self) -> None:
        data = bytes(self._held[: self._size])
        del self._held[: self._size]
        name = f"part-{len(self._parts):05}"
        storage.write_whole(self._folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        self._parts.append({"name": name, "bytes": len(data), "sha256": digest})
        shell.say(f"{name}  {len(data):,} bytes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
