"""Files of the project that come back damaged: an error that names them, or the same result.

Every kind of file is changed at random, as disks, copies and people do, and everything that reads
it is asked. A change may be harmless, as that of white space; it may not be a traceback, and where
the file has a checksum it may not be another result.
"""

import argparse
import itertools
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from spectral_pod import project_files
from spectral_pod.agent import retrieval
from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.errors import DataError, UserError
from spectral_pod.generate import export, model_card, run_records
from spectral_pod.generate.restore import recorded_config
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.train import starts, writers
from spectral_pod.train.sealed_steps import SealedSteps, file_digests
from tests import trainer
from tools import pack, status, unpack

DIGEST = "0" * 64
VALUES = (
    None, True, -1, 0, 7, 2**53 + 1, 2**70, 1.5, -1e308, float("nan"), float("inf"), "", "x",
    "../../../victim", "\ud800", "a" * 5000, [], [1], ["x"], {}, {"a": {"b": []}}, [[[]]],
)  # fmt: skip
CONTENTS = (
    b"", b" ", b"\n", b"null", b"[]", b"{}", b"3", b'"x"', b"{", b"\x00" * 64, b"[" * 100_000,
    b"\xff\xfe", b'{"a": ' * 50_000, b"\x89PNG\r\n\x1a\n", b'{"step": 1}', b"NaN",
)  # fmt: skip


def paths_in(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def changed_value(rng, value):
    """JSON in which one place is removed, replaced, renamed or doubled."""
    path = rng.choice([path for path in paths_in(value) if path])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    kind = rng.choice(["remove", "replace", "replace", "rename"])
    if kind == "replace":
        holder[path[-1]] = rng.choice(VALUES)
    elif kind == "remove" or isinstance(holder, list):
        del holder[path[-1]]
    else:
        holder[f"{path[-1]}x"] = holder.pop(path[-1])
    return value


def changed_line(rng, raw):
    """One line, or the only one, with another value."""
    lines = raw.splitlines(keepends=True) if raw.count(b"\n{") else [raw]
    i = rng.randrange(len(lines))
    end = b"\n" if lines[i].endswith(b"\n") else b""
    lines[i] = json.dumps(changed_value(rng, json.loads(lines[i]))).encode() + end
    return b"".join(lines)


def flipped(rng, raw):
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 5])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def inserted(rng, raw):
    at = rng.randrange(len(raw) + 1)
    return (
        raw[:at]
        + rng.choice([b"\n", b"\n\n", b"\x00", b",", b"}", b'"', rng.randbytes(9)])
        + raw[at:]
    )


def repeated(rng, raw):
    start = rng.randrange(len(raw))
    return raw[: rng.randrange(start, len(raw))] + raw[start:]


CHANGES = (
    lambda rng, raw: raw[: rng.randrange(len(raw))],
    lambda rng, raw: rng.choice(CONTENTS),
    lambda rng, raw: rng.randbytes(rng.randrange(1, 200)),
    lambda rng, raw: raw + b"\n" * rng.randrange(1, 4),
    changed_line, changed_line, changed_line, flipped, inserted, repeated,
)  # fmt: skip


def damage(rng, file, original):
    """Puts a damaged version of a file, or something else, in its place."""
    remove(file)
    if rng.random() < 0.03:
        rng.choice([file.mkdir, lambda: file.symlink_to("nothing"), lambda: None])()
        return
    raw = original
    if rng.random() < 0.5:  # as an older version wrote it
        lines = original.splitlines(keepends=True) if original.count(b"\n{") else [original]
        values = [json.loads(line) for line in lines]
        if any(value.pop("checksum", None) for value in values):
            raw = b"".join(json.dumps(value).encode() for value in values)
    file.write_bytes(rng.choice(CHANGES)(rng, raw))


def remove(file):
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


class Case:
    """A file in a folder of its own, and what reads it.

    `read` returns everything that it determines. What is in `exact` may not change without an
    error, if the file has a checksum.
    """

    exact = True

    def __init__(self, folder):
        self.folder = folder
        self.file = self.write(folder)

    def write(self, folder):
        """Writes the file and what belongs to it; returns its path."""

    def read(self):
        """Raises a UserError, or returns what the file says."""


class Configuration(Case):
    def write(self, folder):
        self.config = trainer.config()
        starts.claim_workdir(str(folder), self.config, DIGEST, ["a", "b"])
        return folder / "config.json"

    def read(self):
        if not self.file.exists():
            return None  # a fresh workdir, or to a reader none
        run = starts.claim_workdir(str(self.folder), self.config, DIGEST, ["a", "b"])
        recorded = project_files.RUN.read(self.file)
        recorded_config(recorded["config"], str(self.file))
        log = project_files.Log(epath.Path(self.folder / "metrics.jsonl"), project_files.METRICS)
        found = status.facts(str(self.folder), log, 1.0)
        assert status.report(found)
        return run, found["task"], found["total_steps"]


class Manifest(Case):
    def write(self, folder):
        rng = np.random.default_rng(0)
        records = [Record(rng.bytes(n), n % 3) for n in (5, 0, 99)]
        splits = {"train": records, "test": records[::-1]}
        byte_store.write(str(folder), splits, classes=["a", "b", "c"], provenance={"by": "x"})
        (folder.parent / "victim").write_text("precious")
        return folder / "manifest.json"

    def read(self):
        assert (self.folder.parent / "victim").read_text() == "precious"
        store = ByteStore(str(self.folder))
        found = []
        for name in ("train", "test"):
            split = store.split(name)
            data = split.read(range(len(split.offsets) - 1))
            store.verification.wait()
            found += [[x.tobytes() for x in data], split.labels.tolist(), split.documents]
        return found, store.classes, store.digest


class Note(Case):
    def write(self, folder):
        self.items = folder / "unfinished"
        part = byte_store.write_part(str(folder), "train", 0, [Record(b"x", 0)], num_classes=1)
        self.items.mkdir()
        note = project_files.ITEM.encode({"parts": {"train": part}, "facts": [1]})
        (self.items / "00000.json").write_bytes(note)
        return self.items / "00000.json"

    def read(self):
        """A damaged note does not count: its item is converted again, which is no error."""
        try:
            item = project_files.ITEM.content(self.file.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(str(error)) from error
        path = str(self.folder)
        parts = {split: [part] for split, part in item["parts"].items()}
        byte_store.finish(path, parts, classes=["a"], provenance={"facts": item["facts"]})
        return item["parts"]


class SealOfStep(Case):
    def write(self, folder):
        step = folder / "checkpoints/4/default"
        step.mkdir(parents=True)
        (step / "a").write_bytes(b"1" * 50)
        (folder / "seals").mkdir()
        files = file_digests(epath.Path(folder / "checkpoints/4"))
        seal = {"run": DIGEST, "step": 4, "metrics": {"score": 0.5}, "files": files}
        project_files.SEAL.write(folder / "seals/4.json", seal)
        recorded = {"config": trainer.config().to_dict(), "data_digest": DIGEST}
        project_files.RUN.write(folder / "config.json", recorded)
        return folder / "seals/4.json"

    def read(self):
        log = project_files.Log(epath.Path(self.folder / "metrics.jsonl"), project_files.METRICS)
        assert status.report(status.facts(str(self.folder), log, 1.0))
        sealed = SealedSteps(f"{self.folder}/checkpoints", DIGEST)
        sealed.latest_sound_step  # noqa: B018
        step = sealed.choose()
        return step, sealed.metrics(step)


class Pack(Case):
    def write(self, folder):
        run = folder.with_name("run")
        seal = SealOfStep(run).file
        identity = project_files.run_id(project_files.RUN.read(epath.Path(run / "config.json")))
        trainer.edit(seal, lambda content: content.update(run=identity))
        assert pack.main([str(run), f"--out={folder}", "--part_mb=0.004"]) == 0
        self.reads = itertools.count()
        return folder / "manifest.json"

    def read(self):
        workdir = self.folder.with_name(f"unpacked-{next(self.reads)}")
        try:
            unpack.unpack(argparse.Namespace(pack=str(self.folder), workdir=str(workdir)))
        except UserError:
            assert not (workdir / "config.json").exists()
            raise
        return {path.relative_to(workdir): raw for path, raw in trainer.contents(workdir).items()}


class PassageIndex(Case):
    def write(self, folder):
        (folder.parent / "a.txt").write_text("the first words of a document")
        retrieval.build(str(folder.parent / "a.txt"), str(folder))
        return folder / "index.json"

    def read(self):
        index = retrieval.Index(str(self.folder))
        return index.find("first words"), index.facts


class ResultOfRun(Configuration):
    def write(self, folder):
        super().write(folder)
        evaluation = {"split": "test", "loss": 0.5, "accuracy": 0.25}
        project_files.RESULT.write(folder / "result.json", {"step": 4, "eval": evaluation})
        return folder / "result.json"

    def read(self):
        log = project_files.Log(epath.Path(self.folder / "metrics.jsonl"), project_files.METRICS)
        assert status.report(status.facts(str(self.folder), log, 1.0))
        if not self.file.exists():
            return None
        records = run_records.RunRecords(project_files.RESULT.read(self.file), metrics=log.lines)
        return list(model_card._results(records.figures(4)))


class Metrics(Configuration):
    exact = False  # a digit of a curve may differ: nothing follows from it

    def write(self, folder):
        super().write(folder)
        lines = [
            {
                "step": step,
                "train/loss": 0.5,
                "speed/steps_per_second": 3.0,
                "wall_time": 1.7e9 + step,
            }
            for step in range(1, 9)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder / "metrics.jsonl"

    def read(self):
        log = project_files.Log(epath.Path(self.file), project_files.METRICS)
        found = status.facts(str(self.folder), log, 1.7e9)
        assert status.report(found)
        status.picture(log.lines, 80, colour=False)
        start = {"step": 0, "wall_time": 1.7e9, "devices": "2 cpu", "processes": 1}
        records = run_records.RunRecords(starts=[start], metrics=log.lines)
        records.figures(8), records.footprint(8)
        kept = writers._sound_lines(epath.Path(self.file))
        assert len(kept) <= len(log.lines)
        return kept


class Starts(Configuration):
    exact = False

    def write(self, folder):
        super().write(folder)
        self.mesh = make_mesh(
            dict.fromkeys(("data", "fsdp", "sequence", "tensor"), 1), jax.devices()[:1]
        )
        for step in (0, 5):
            starts.record_start(str(folder), self.mesh, step, {"fft": ("real", "by a count")})
        return folder / "starts.jsonl"

    def read(self):
        log = project_files.Log(epath.Path(self.folder / "metrics.jsonl"), project_files.METRICS)
        assert status.report(status.facts(str(self.folder), log, 1.0))
        known = project_files.Log(epath.Path(self.file), project_files.START).lines
        line = {"step": 8, "wall_time": 2e9, "goodput/step_seconds": 1.0}
        run_records.RunRecords(starts=known, metrics=[line]).footprint(8)
        starts.record_start(str(self.folder), self.mesh, 9, {})
        return json.loads(self.file.read_text().splitlines()[-1])["step"]


class Exported(Case):
    def write(self, folder):
        shutil.copytree(exported_once(), folder)
        return folder / "config.json"

    def read(self):
        trained = export.load(str(self.folder))
        return trained.classes, trained.step, trained.data_digest, str(trained.config)


def exported_once():
    """A folder with a small exported model."""
    from spectral_pod.generate.restore import restore_for_inference
    from tests.tiny_run import tiny_config, write_run

    folder = trainer.home() / "exported"
    if not folder.exists():
        fields = {"model.num_layers": 1, "model.memory_interval": 0}
        write_run(folder.with_name("run-to-export"), tiny_config(**fields))
        export.save(restore_for_inference(str(folder.with_name("run-to-export"))), str(folder))
    return folder


CASES = (
    Configuration, Manifest, Note, SealOfStep, Pack, PassageIndex, ResultOfRun, Metrics, Starts,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize(
    "count", [50, pytest.param(500, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_damaged_files(tmp_path, case, count):
    handled = run_case(case, tmp_path / "place", count)
    assert handled["refused"] > 0 or not case.exact
    print(f"{case.__name__}: {count} damaged files: {handled}")


@pytest.mark.slow
def test_damaged_exports(tmp_path):
    print(run_case(Exported, tmp_path / "place", 100))


def run_case(kind, folder, count):
    """Counts of how damaged files ended; fails for a traceback and for a different result."""
    case = kind(folder)
    original, around = case.file.read_bytes(), snapshot(folder, case.file)
    has_checksum = b'"checksum"' in original
    expected = case.read()
    restore(folder, around)
    ended = {"refused": 0, "same": 0, "different": 0}
    for seed in range(count):
        rng = random.Random(f"{kind.__name__} {seed}")
        restore(folder, around)
        damage(rng, case.file, original)
        signed = has_checksum and case.file.is_file() and b'"checksum"' in case.file.read_bytes()
        damaged = case.file.read_bytes() if case.file.is_file() else b"no file"
        try:
            found = case.read()
        except UserError:
            ended["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {damaged[:2000]!r}") from error
        ended["same" if found == expected else "different"] += 1
        if case.exact and signed:
            assert found == expected, f"seed {seed}: {damaged[:2000]!r}"
    return ended


def snapshot(folder, without):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path != without
    }


def restore(folder, files):
    """Makes a folder hold these files only."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_symlink() or (path.is_file() and path.relative_to(folder) not in files):
            path.unlink()
    for name, raw in files.items():
        path = pathlib.Path(folder / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != raw:
            path.write_bytes(raw)
