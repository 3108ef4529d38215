"""A run that stops by the clock, is packed and goes on elsewhere ends as one that never moved."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from etils import epath

from spectral_pod import project_files, storage
from spectral_pod.lease import Lease
from tests import trainer
from tests.storage.conftest import bucket, server  # noqa: F401
from tests.tiny_run import write_run
from tools import pack, unpack

STEP = 17  # between two checkpoints and two lines of metrics


def tool(name, *arguments, code=0):
    return trainer.run([sys.executable, "-m", f"tools.{name}", *map(str, arguments)], code)


def stopped_at(step, workdir):
    """Trains until the clock strikes at a step; its code tells a supervisor not to restart it."""
    command = ["env", f"TIME_IS_UP_AT={step}", *trainer.command(workdir)]
    said = trainer.run(command, code=78).stderr.strip().splitlines()[-1]
    assert said == (
        f"TimeUp: --stop_after_minutes is over; step {step + 1} is saved, and the same command "
        "continues from it"
    )


def digest(done):
    return re.search(r"^sha256 ([0-9a-f]{64})$", done.stdout, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that has stopped at step 18; its files are not changed."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    stopped_at(STEP, workdir)
    return workdir


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A packed run with drawn parameters, in a dozen parts."""
    folder = tmp_path_factory.mktemp("small")
    write_run(folder / "run")
    assert pack.main([f"{folder}/run", f"--out={folder}/packed", "--part_mb=0.05"]) == 0
    assert len(list((folder / "packed").glob("part-*"))) >= 3
    return folder / "packed"


@pytest.fixture
def packed(small, tmp_path):
    return shutil.copytree(small, tmp_path / "packed")


# ---- the same run


def test_a_run_that_moves_twice_ends_as_if_it_had_not(stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    for move, step in enumerate((STEP, 31)):
        if move:
            stopped_at(step, workdir)
        for left in ("compilation_cache/program", "plugins/profile/x", "PROFILE/x", "wandb/run"):
            (workdir / left).parent.mkdir(parents=True)
            (workdir / left).write_bytes(bytes(1000))
        parts, moved = tmp_path / f"parts{move}", tmp_path / f"moved{move}"
        tool("pack", workdir, f"--out={parts}", "--part_mb=0.1")
        assert all(part.stat().st_size <= 100_000 for part in parts.glob("part-*"))
        assert "JAX" not in tool("unpack", parts, f"--workdir={moved}").stderr
        assert [path.name for path in (moved / "checkpoints").iterdir()] == [f"{step + 1}"]
        assert {path.name for path in moved.iterdir()} == {
            "checkpoints", "config.json", "metrics.jsonl", "seals", "starts.jsonl", "train",
            *({"validation"} if move else ()),
        }  # fmt: skip
        shutil.rmtree(workdir)
        workdir = moved
    elsewhere = trainer.command(workdir, f"data.dir={tmp_path}/data")  # which it makes anew
    said = trainer.run(elsewhere).stdout
    assert "writing the listops data" in said
    assert "starting at step 32\n" in said
    trainer.assert_same_run(workdir, trainer.uninterrupted())
    trained = [line["step"] for line in trainer.metrics(workdir) if "train/loss" in line]
    assert trained == sorted(set(trained))
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 18, 32]


def test_the_best_checkpoint_goes_along_if_it_is_wanted(tmp_path):
    """The best validation is that of an earlier step, which the run keeps to its end."""
    workdir = tmp_path / "run"
    shutil.copytree(trainer.uninterrupted(), workdir)
    for seal, score in ((35, 0.9), (40, 0.1)):
        trainer.edit(
            workdir / f"seals/{seal}.json", lambda x, s=score: x.update(metrics={"score": s})
        )
    tool("pack", workdir, f"--out={tmp_path}/newest")
    tool("pack", workdir, f"--out={tmp_path}/both", "--keep_best=1")
    for name, steps in (("newest", {"40"}), ("both", {"35", "40"})):
        tool("unpack", tmp_path / name, f"--workdir={tmp_path}/{name}-run")
        folder = tmp_path / f"{name}-run"
        assert {path.name for path in (folder / "checkpoints").iterdir()} == steps
        assert {path.stem for path in (folder / "seals").iterdir()} == steps
        assert trainer.result(folder) == trainer.result(workdir)


def test_the_digest_is_of_the_state_and_nothing_else(stopped, tmp_path, monkeypatch, capsys):
    """Whatever the size of the parts, the place, the times and the order of the files."""
    first = digest(tool("pack", stopped, f"--out={tmp_path}/a"))
    copy = shutil.copytree(stopped, tmp_path / "copy", copy_function=shutil.copy)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    assert digest(tool("pack", copy, f"--out={tmp_path}/b", "--part_mb=0.05")) == first
    tool("unpack", tmp_path / "b", f"--workdir={tmp_path}/moved")
    assert digest(tool("pack", tmp_path / "moved", f"--out={tmp_path}/c")) == first
    with monkeypatch.context() as patch:
        listed = storage.files_below
        patch.setattr(storage, "files_below", lambda folder: listed(folder)[::-1])
        assert pack.main([str(stopped), f"--out={tmp_path}/e"]) == 0
    assert f"sha256 {first}\n" in capsys.readouterr().out
    with open(copy / "metrics.jsonl", "a") as file:
        file.write("\n")
    assert digest(tool("pack", copy, f"--out={tmp_path}/d")) != first


def test_a_damaged_checkpoint_is_left_out(tmp_path):
    workdir = shutil.copytree(trainer.uninterrupted(), tmp_path / "run")
    (workdir / "checkpoints/40/_CHECKPOINT_METADATA").write_text("{}")
    said = tool("pack", workdir, f"--out={tmp_path}/parts")
    assert "step 35 of run" in said.stdout
    assert "checkpoint step 40 is not sound: _CHECKPOINT_METADATA is altered" in said.stderr


def test_through_a_bucket(small, server, bucket, tmp_path):  # noqa: F811
    def at_storage(name, *arguments):
        command = [sys.executable, "-m", f"tools.{name}", *arguments]
        return trainer.run(server.used_by(command))

    at_storage("unpack", str(small), f"--workdir={bucket.url}/run")
    assert not [name for name in bucket.names() if "lease" in name or "UNPACKING" in name]
    done = at_storage("pack", f"{bucket.url}/run", f"--out={bucket.url}/parts", "--part_mb=0.05")
    at_storage("unpack", f"{bucket.url}/parts", f"--workdir={tmp_path}/back")
    manifest = project_files.PACK.read(epath.Path(small) / "manifest.json")
    assert digest(done) == manifest["sha256"]
    run = small.parent / "run"
    assert {path.relative_to(run): data for path, data in trainer.contents(run).items()} == {
        path.relative_to(tmp_path / "back"): data
        for path, data in trainer.contents(tmp_path / "back").items()
    }


# ---- the clock


@pytest.mark.slow
def test_the_clock_ends_a_run_and_the_run_goes_on(tmp_path):
    """Its limit is of minutes since the start; a slow machine needs more of them for its steps."""
    endless = ("train.total_steps=1000000000", "checkpoint.every_steps=1000000")
    command = trainer.command(tmp_path / "run", *endless, "train.eval_every_steps=1000000")
    for minutes in ("0.25", "1", "4"):
        trainer.run([*command, f"--stop_after_minutes={minutes}"], code=78, timeout=600)
        if seals := list((tmp_path / "run").glob("seals/*.json")):
            break
    (step,) = (int(seal.stem) for seal in seals)
    assert 0 <= step - trainer.metrics(tmp_path / "run")[-1]["step"] <= 2  # a line in two steps
    again = trainer.run([*command, f"--stop_after_minutes={minutes}"], code=78, timeout=600)
    assert f"starting at step {step}\n" in again.stdout
    assert (tmp_path / "run/config.json").read_text().count("stop_after") == 0


def test_a_clock_that_strikes_before_the_first_step(tmp_path):
    done = trainer.run([*trainer.command(tmp_path / "run"), "--stop_after_minutes=1e-3"], code=78)
    said = done.stderr.strip().splitlines()[-1]
    assert said == "TimeUp: --stop_after_minutes is over; there is nothing new to save"
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", ""])
def test_minutes_that_are_none(tmp_path, text):
    command = [*trainer.command(tmp_path / "run"), f"--stop_after_minutes={text}"]
    said = trainer.run(command, code=2).stderr.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("ConfigError: --stop_after_minutes is ")
    assert not (tmp_path / "run").exists()


# ---- what is refused


def refused(folder, workdir, capsys):
    """What unpacking says, which leaves no file."""
    assert unpack.main([str(folder), f"--workdir={workdir}"]) == 2
    assert not workdir.exists()
    lines = capsys.readouterr().err.splitlines()
    (message,) = (line for line in lines if "Error: " in line)
    return message


def missing(folder):
    (folder / "part-00001").unlink()
    return "part-00001 is missing"


def truncated(folder):
    data = (folder / "part-00001").read_bytes()
    (folder / "part-00001").write_bytes(data[:-1])
    return r"part-00001 has 49,999 bytes, and had 50,000"


def altered(folder):
    data = bytearray((folder / "part-00001").read_bytes())
    data[1000] ^= 1
    (folder / "part-00001").write_bytes(data)
    return "part-00001 is altered"


def swapped(folder):
    (folder / "part-00000").rename(folder / "x")
    (folder / "part-00001").rename(folder / "part-00000")
    (folder / "x").rename(folder / "part-00001")
    return "part-00000 has the content of part-00001; .*part-00001 has the content of part-00000"


def without_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


def altered_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"step": 1,', '"step": 2,'))
    return "manifest.json cannot be used: its content differs from its checksum"


@pytest.mark.parametrize(
    "damage", [missing, truncated, altered, swapped, without_manifest, altered_manifest]
)
def test_damage_is_named_before_anything_is_written(packed, tmp_path, capsys, damage):
    message = damage(packed)
    said = refused(packed, tmp_path / "new", capsys)
    assert re.search(f"DataError: {packed}/{message}.*copy it again", said), said


def rewritten(folder, change):
    """A pack whose archive is another one, with the checksums of that."""
    manifest = project_files.PACK.read(epath.Path(folder) / "manifest.json")
    for part in manifest["parts"]:
        (folder / part["name"]).unlink()
    parts = pack._Parts(epath.Path(folder), 50_000)
    change(parts)
    project_files.PACK.write(epath.Path(folder) / "manifest.json", manifest | parts.finish())


@pytest.mark.parametrize("name", ["../victim", "/victim", "a/../../victim", "link"])
def test_names_that_leave_the_workdir(packed, tmp_path, capsys, name):
    name = f"{tmp_path}{name}" if name.startswith("/") else name

    def hostile(parts):
        with tarfile.open(fileobj=parts, mode="w|") as archive:
            info = tarfile.TarInfo(name)
            if name == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)

    rewritten(packed, hostile)
    assert unpack.main([str(packed), f"--workdir={tmp_path}/new"]) == 2
    assert f"{name!r}, which is no file of a run" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "new"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"UNPACKING"}


def test_what_is_no_archive(packed, tmp_path, capsys):
    rewritten(packed, lambda parts: parts.write(bytes(range(256)) * 400))
    assert unpack.main([str(packed), f"--workdir={tmp_path}/new"]) == 2
    assert "holds no archive of a run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_workdir_in_use_is_left_alone(packed, tmp_path, capsys, name):
    workdir = tmp_path / "mine"
    workdir.mkdir()
    (workdir / name).write_text("precious")
    assert unpack.main([str(packed), f"--workdir={workdir}"]) == 2
    assert f"--workdir={workdir} holds " in capsys.readouterr().err
    assert trainer.contents(workdir) == {workdir / name: b"precious"}


def test_an_unpack_that_is_interrupted_leaves_no_run_and_can_be_repeated(
    packed, small, tmp_path, monkeypatch, capsys
):
    """At each of its files in turn, also as the last is being written."""
    workdir, write = tmp_path / "new", storage.write_whole
    expected = trainer.contents(small.parent / "run")
    for count in range(len(expected) + 1):
        files = []

        def failing(file, data, files=files, count=count):
            files.append(file)
            if len(files) > count:
                file.with_name(f"{file.name}.tmp").write_bytes(b"half of it")
                raise KeyboardInterrupt
            write(file, data)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_whole", failing)
            code = unpack.main([str(packed), f"--workdir={workdir}"])
        assert code == 130
        assert not (workdir / "config.json").exists()
    assert (workdir / "seals/1.json").exists()
    assert unpack.main([str(packed), f"--workdir={workdir}"]) == 0
    run = small.parent / "run"
    restored = {path: workdir / path.relative_to(run) for path in expected}
    assert {path: restored[path].read_bytes() for path in expected} == expected
    assert not (workdir / "UNPACKING").exists()
    assert unpack.main([str(packed), f"--workdir={workdir}"]) == 2
    assert "holds a run" in capsys.readouterr().err


def test_a_pack_that_is_killed_is_none_and_can_be_repeated(stopped, tmp_path, capsys):
    out = tmp_path / "parts"
    command = ["tools.pack", str(stopped), f"--out={out}", "--part_mb=0.001"]
    child = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=trainer.ROOT, env=trainer.environment()
    )
    while not list(out.glob("part-*")):
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert "manifest.json is missing" in refused(out, tmp_path / "new", capsys)
    assert pack.main([str(stopped), f"--out={out}"]) == 0
    assert {path.name for path in out.iterdir()} == {"manifest.json", "part-00000"}
    assert pack.main([str(stopped), f"--out={out}"]) == 2
    assert f"--out={out} holds 'manifest.json'" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_and_a_folder_without_a_run(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "absent"):
        assert pack.main([str(path), f"--out={tmp_path}/new"]) == 2
        assert f"{path} is no workdir of a run" in capsys.readouterr().err
    write_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert pack.main([f"{tmp_path}/run", f"--out={tmp_path}/new"]) == 2
    assert "holds no sound checkpoint" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_unpack_waits_for_nobody(packed, tmp_path):
    with Lease(f"{tmp_path}/new/lease.json", "it"):
        said = tool("unpack", packed, f"--workdir={tmp_path}/new", code=2).stderr
    assert f"workdir {tmp_path}/new is in use by process {os.getpid()}" in said
