"""pre-commit runs the checks of launch/test.sh, by the same commands."""

import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).parents[2]


def test_hooks_are_the_checks_of_the_gate():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook["entry"] for hook in local["hooks"]}
    # Of the shell scripts it is a test that the gate runs.
    assert hooks.pop("shellcheck").endswith(
        "pytest -n 0 tests/launch/test_supervise.py -k shellcheck"
    )
    gate = re.findall(
        r'^"\$python" (-m (?!pytest)[^&\n]+)', (ROOT / "launch/test.sh").read_text(), re.M
    )
    assert list(hooks.values()) == [f".venv/bin/python {command.strip()}" for command in gate]
    assert not any(hook["pass_filenames"] for hook in local["hooks"])
