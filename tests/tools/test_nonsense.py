"""Nonsense in every flag of every tool: one line that names the flag or the file, or success.

The flags are those of the parsers, so that a new one is tried as well.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import Record
from spectral_pod.train import starts
from tests import trainer
from tests.tiny_run import DIGEST, tiny_config, write_run
from tests.tools.test_shell import tools
from tools import pack, preflight, shell

CONFIG = f"--config={trainer.ROOT}/tests/tools/tiny.py"
# A command line of each tool that works, from a folder with what `folder` writes.
COMMANDS = {
    "tools.ablate": [[CONFIG, "--out=new", "--variants=base", "--dry_run"]],
    "tools.agent": [["--workdir=run", "--task=x", "--tools=calculator"]],
    "tools.agent_evaluate": [["--workdir=run", "--questions=2"]],
    "tools.agent_reject": [["--workdir=run", "--out=new"]],
    "tools.analyze": [["--workdir=run"], [CONFIG]],
    "tools.baseline": [[CONFIG]],
    "tools.bench": [["ops"]],
    "tools.bench.big": [["write", "new", "0.0001"]],
    "tools.bench.scaling": [[CONFIG, "--topologies=cpu-1"]],
    "tools.bench.slices": [["--configs=quickstart.py", "--topologies=cpu-2"]],
    "tools.bucket": [["create", "gs://bucket", "--location=eu"], ["upload", "text", "gs://b/x"]],
    "tools.contact_sheet": [["--output=new.png", "--columns=1"]],
    "tools.export": [["--workdir=run", "--output=new"]],
    "tools.generate": [["--workdir=run", "--prompt=x", "--num_bytes=2"]],
    "tools.gke": [["--name=n", "--image=i", "--workdir=gs://b/r", "--topology=v4-8", "--", CONFIG]],
    "tools.lra": [["--out=new", "--tasks=listops", "--models=fnet", "--dry_run"]],
    "tools.pack": [["run", "--out=new"]],
    "tools.preflight": [[CONFIG, "--topology=cpu-2"]],
    "tools.profile": [[CONFIG, "--out=new"]],
    "tools.rag": [
        ["index", "text", "--out=new"],
        ["search", "--index=new", "x"],
        ["ask", "--index=new", "--workdir=run", "x"],
        ["evaluate", "--workdir=run"],
    ],
    "tools.records": [
        ["write", "--task=records", "--out=new", "--train=set.jsonl"],
        ["write", "--task=lm", "--out=new", "--source=text"],
        ["describe", "store"],
        ["verify", "store"],
        ["head", "store"],
        ["tfds", "store", "--name=n", "--data_dir=new"],
    ],
    "tools.report": [
        ["add", "n", "store/manifest.json", "--columns=documents", "--command=c", "--machine=m"]
    ],
    "tools.sanity": [[CONFIG, "--out=new"]],
    "tools.status": [["run"]],
    "tools.sweep": [[CONFIG, "--out=new", "--vary=optimizer.learning_rate=1,2", "--trials=1"]],
    "tools.traces": [["log.jsonl", "--out=new.jsonl"]],
    "tools.tune": [[CONFIG]],
    "tools.unpack": [["packed", "--workdir=new"]],
}
# What tools do with values that they accept is left out: of these always, as it takes long or a
# network; in the gate of all but the latter.
LONG = {
    "tools.agent", "tools.agent_evaluate", "tools.agent_reject", "tools.analyze",
    "tools.baseline", "tools.bench", "tools.bench.big", "tools.bench.scaling", "tools.bucket",
    "tools.bench.slices", "tools.preflight", "tools.profile", "tools.rag", "tools.sanity",
    "tools.sweep", "tools.tune",
}  # fmt: skip
SHORT = {"tools.gke", "tools.status"}
RUN = shell.run
NONSENSE = [
    "", " ", "x", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "9" * 30, "None", "True", "()",
    "[1,", "(", "[", "é", "\udcff", "a\0b", "a\nb", "~", "~/x", "~nobody-here/x", "gs:/typo",
    "gs://", "gs://Bucket", "s3://b/x", "file://x", "file:///", "/", "..", "a" * 300, "a/" * 600,
    "text", "text/x", "binary", "empty", "broken", "broken/x", "run", "gone/x", "store", "--",
    "-x", "=", "1,2", "%s{}",
]  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run without checkpoints, a store, records, and what is none of these."""
    folder = tmp_path_factory.mktemp("template")
    starts.claim_workdir(str(folder / "run"), tiny_config(), DIGEST)
    splits = {
        split: [Record(bytes([i]), i % 2) for i in range(4)]
        for split in ("train", "validation", "test")
    }
    byte_store.write(str(folder / "store"), splits, classes=["a", "b"], provenance={})
    rows = [json.dumps({"text": f"{i}", "label": i % 2}) + "\n" for i in range(60)]
    (folder / "set.jsonl").write_text("".join(rows))
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "log.jsonl").write_text(json.dumps({"messages": said}))
    (folder / "text").write_text("some text")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty").mkdir()
    (folder / "broken").symlink_to(folder / "nothing")
    return folder


@pytest.fixture
def folder(template, tmp_path, monkeypatch):
    """The working folder, two below one with a file, beside an empty home."""
    folder = tmp_path / "above/above/folder"
    shutil.copytree(template, folder, symlinks=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/precious").write_text("precious")
    (folder.parent / "precious").write_text("precious")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    return folder


def actions_of(main, argv, monkeypatch):
    """The flags and positional arguments of a tool, or of the command of it that `argv` names."""
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr(shell, "run", lambda parser, *_, **__: parsers.append(parser))
        main(argv)
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[argv[0]]._actions
    return parsers[0]._actions


def cases(good, actions):
    """(flag, value, arguments) with each value of each flag, in place of its good one."""
    positional = [action.dest for action in actions if not action.option_strings]
    places = [i for i, text in enumerate(good) if not text.startswith("-")][-len(positional) :]
    for action in actions:
        if isinstance(action, argparse._HelpAction) or action.nargs in ("+", "*"):
            continue
        if not action.option_strings:
            at = places[positional.index(action.dest)]
            for value in NONSENSE:
                yield action.dest, value, [*good[:at], value, *good[at + 1 :]]
            continue
        flag = action.option_strings[-1]
        rest = [text for text in good if text.partition("=")[0] != flag]
        end = rest.index("--") if "--" in rest else len(rest)
        for value in ["x"] if action.nargs == 0 else NONSENSE:
            yield flag, value, [*rest[:end], f"{flag}={value}", *rest[end:]]


def everything(folder):
    return set(folder.parents[2].rglob("*"))


def test_every_tool_is_tried():
    assert set(COMMANDS) == set(tools())


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_nonsense_in_a_flag(name, part, folder, monkeypatch, capfd):
    main = importlib.import_module(f"{name}.__main__" if name == "tools.bench" else name).main
    if part and name in ("tools.generate", "tools.export", "tools.pack", "tools.unpack"):
        write_run(folder / "run", tiny_config())
        if name == "tools.unpack":
            assert pack.main(["run", "--out=packed"]) == 0
            capfd.readouterr()
    failure = preflight.INVALID if name == "tools.preflight" else 2
    works = name not in LONG if part else name in SHORT
    for good in COMMANDS[name]:
        actions = actions_of(main, good, monkeypatch)
        for flag, value, argv in [*cases(good, actions)][part::10]:
            before = everything(folder)
            with monkeypatch.context() as patch:
                if not works:
                    patch.setattr(shell, "run", only_parsing)
                code = main(argv)
            said = capfd.readouterr().err
            appeared = everything(folder) - before
            for path in sorted(appeared, reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            assert before <= everything(folder), f"{argv} deletes files"
            if code == 0:
                continue
            assert code == failure, f"{argv}: {code}"
            assert "Traceback" not in said
            (line,) = [line for line in said.splitlines() if "Error: " in line]
            shown = flag.lstrip("-"), repr(value)[1:-1][:60]
            if value.startswith(("~", "..")):  # the message may name where that leads
                shown = (*shown, os.path.abspath(os.path.expanduser(value)))
            if not flag.startswith("-") and value.startswith("-"):  # it is a flag, to every parser
                shown = (*shown, "the following arguments are required", "Unknown command line")
            assert any(text.lower() in line.lower() for text in shown), f"{argv}: {line}"
            # An unfinished write continues with what it has written.
            assert good[0] == "write" or not appeared, f"{argv} leaves {appeared}"


def only_parsing(parser, main, argv, **options):
    return RUN(parser, lambda arguments: None, argv, **options)


@pytest.mark.parametrize("closed", [False, True])
def test_a_reader_that_leaves(template, closed):
    """`| head -1` ends a tool silently; without a stdout it does its work."""
    command = [sys.executable, "-m", "tools.gke", *COMMANDS["tools.gke"][0]]
    reader, writer = os.pipe()
    os.close(reader)
    close = (lambda: os.close(1)) if closed else None
    done = subprocess.run(
        command, cwd=trainer.ROOT, env=trainer.environment(), stdout=writer,
        stderr=subprocess.PIPE, preexec_fn=close, text=True,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0 if closed else 141, "")
