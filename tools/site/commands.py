"""The pages of command lines: what `--help` prints."""

import argparse
import importlib
import os
import pathlib
import subprocess
from collections.abc import Iterator
from unittest import mock

from absl import flags

from spectral_pod import command_line
from tools import shell
from tools.site.fields import cell, rows_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
_LAUNCHERS = (
    "local.sh", "supervise.sh", "docker_gpu.sh", "slurm.sh", "tpu_pod.sh", "setup.sh", "test.sh",
)  # fmt: skip


def modules() -> Iterator[str]:
    """The tools, as `python -m` takes them; tools/peers has an environment of its own."""
    for path in sorted((ROOT / "tools").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "peers" not in parts and "\nif __name__ ==" in path.read_text():
            yield ".".join(parts)


def page_of_tools() -> str:
    """`--help` of every tool and of its commands."""
    parts = [
        "# Tools",
        "`python -m tools.NAME`; of an installed package `python -m spectral_pod.tools.NAME`.",
    ]
    for module in modules():
        parts.append(f"## {module.removesuffix('.__main__')}")
        parts += [f"```text\n{text.rstrip()}\n```" for text in _help(module)]
    return "\n\n".join(parts) + "\n"


def _help(module: str) -> Iterator[str]:
    parsers: list[argparse.ArgumentParser] = []
    with (
        mock.patch.object(shell, "run", lambda parser, *_, **__: parsers.append(parser)),
        mock.patch.dict(os.environ, COLUMNS="100"),
    ):
        importlib.import_module(module).main([])
        (parser,) = parsers
        yield parser.format_help()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield command.format_help()


def page_of_trainer() -> str:
    """The flags of `spectral_pod.main`."""
    values = flags.FlagValues()
    command_line.trainer_flags(values)
    rows = [
        (f"`--{name}`", cell(values[name].help or ""))
        for name in command_line.TrainerFlags.__annotations__
    ]
    return "\n\n".join(
        [
            "# The trainer",
            "    python -m spectral_pod.main --config=FILE.py[:PRESET] --workdir=DIR",
            "`launch/local.sh` takes the same flags; an installed package has `spectral-pod`.",
            rows_of(("flag", "meaning"), rows),
            "Every [field of the configuration](config.md) is a flag as well.",
        ]
    )


def page_of_launchers() -> str:
    """`--help` of the launchers."""
    parts = ["# Launchers"]
    for name in _LAUNCHERS:
        path = ROOT / "launch" / name
        done = subprocess.run([path, "--help"], capture_output=True, text=True, check=True)
        parts += [f"## launch/{name}", f"```text\n{done.stdout.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"
