"""The commands of tutorials and how-to pages, run in order as a new user does, with few steps."""

import re
import shlex
import subprocess
import sys

import pytest

from tests import trainer
from tests.test_readme import files_of, lines_of
from tests.trainer import ROOT

DOCS = ROOT / "docs"
# What makes a run small; the first two replace what a page says.
SMALL = (
    "--config.train.total_steps=3", "--config.train.eval_every_steps=3",
    "--config.optimizer.warmup_steps=1", "--config.train.global_batch_size=4",
    "--config.train.eval_batch_size=4", "--config.checkpoint.every_steps=3",
    "--config.train.sample_bytes=4", "--config.model.num_layers=2",
)  # fmt: skip
# Of tools, likewise; those that take minutes whatever their flags, test_readme.py parses only.
FEW = {
    "tools.agent": ["--bytes=200"],
    "tools.agent_evaluate": ["--questions=2"],
    "tools.generate": ["--num_bytes=4"],
}
LONG = ("tools.sanity", "tools.preflight", "tools.tune", "tools.gke")
STARTS = ("launch/local.sh", "launch/supervise.sh launch/local.sh")


def without(words, flags):
    """Words but those that set one of these flags."""
    names = {flag.partition("=")[0] for flag in flags}
    return [word for word in words if word.partition("=")[0] not in names]


def small(line):
    """The command that a test runs in place of one of a page; None if it is none."""
    words = shlex.split(re.split(" [|>] ", line)[0])
    while words and "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]  # variables
    text = " ".join(words)
    for start in STARTS:
        if text.startswith(f"{start} "):
            given = without(words[len(start.split()) :], SMALL)
            return [sys.executable, "-m", "spectral_pod.main", *given, *SMALL]
    if text.startswith("python -m tools."):
        name, few = words[2], FEW.get(words[2], [])
        if name not in LONG:
            return [sys.executable, "-m", name, *without(words[3:], few), *few]
    if text.startswith("python ") and words[1].endswith(".py"):
        return [sys.executable, *words[1:]]
    if words[:1] == ["touch"]:
        return words
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["tutorials/records", "tutorials/language_model", "tutorials/agent", "howto/resume",
     "howto/mixer"],
)  # fmt: skip
def test_a_page_can_be_followed(name, tmp_path):
    page = DOCS / f"{name}.md"
    for file, text in files_of(page).items():
        (tmp_path / file).write_text(text)
    (tmp_path / "tools").symlink_to(ROOT / "tools")  # a checkout has it
    commands = [command for line in lines_of(page) if (command := small(line))]
    assert len(commands) >= 2
    for command in commands:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=900,
            env=trainer.environment() | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        )  # fmt: skip
        # After three steps an agent answers nothing, which is an error of one line.
        silent = "tools.agent" in command and "there is no answer" in done.stderr
        assert done.returncode == 0 or silent, f"{shlex.join(command)}\n{done.stderr[-3000:]}"
    assert list(tmp_path.rglob("result.json"))
