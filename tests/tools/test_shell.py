"""What all tools share: --help, and mistakes that are one line."""

import pathlib
import subprocess
import sys

import pytest

from spectral_pod.errors import DataError
from spectral_pod.fields import Positive
from tests import trainer
from tools import shell

TOOLS = pathlib.Path(shell.__file__).parent


def tools():
    """The modules below tools/ that can be run; tools/peers has its own environment."""
    for path in sorted(TOOLS.rglob("*.py")):
        parts = path.relative_to(TOOLS.parent).with_suffix("").parts
        if "peers" not in parts[:-1] and 'if __name__ == "__main__"' in path.read_text():
            yield ".".join(part for part in parts if part != "__main__")


def test_the_tools_are_found():
    assert {"tools.preflight", "tools.bench", "tools.bench.scaling"} < set(tools())


@pytest.mark.parametrize("name", list(tools()))
def test_help(name):
    done = trainer.run([sys.executable, "-m", name, "--help"])
    assert done.stdout.startswith(f"usage: python -m {name} [-h]")
    assert f"python -m {name} " in done.stdout.partition("\n\n")[2]  # the docstring's example
    assert done.stderr == ""


def run(argv, main=lambda arguments: None, **options):
    parser = shell.parser("status", "A tool.")
    parser.add_argument("--workdir", required=True)
    parser.add_value("--steps", Positive, 3)
    return shell.run(parser, main, argv, **options)


def fails(error):
    def main(arguments):
        raise error

    return main


def test_values_and_exit_codes():
    seen = []
    assert run(["--workdir=w", "--steps=7"], lambda a: seen.append((a.workdir, a.steps))) == 0
    assert run(["--workdir", "w"], lambda a: seen.append(a.steps)) == 0
    assert seen == [("w", 7), 3]
    assert run(["--workdir=w"], lambda a: 5) == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "ConfigError: the following arguments are required: --workdir"),
        (["--workdir=w", "--steps=0"], "ConfigError: --steps is 0; it must be at least 1"),
        (["--workdir=w", "--steps=x"], "ConfigError: --steps is 'x'; it must be an int"),
        (["--workdir=w", "x"], "ConfigError: unexpected argument 'x'; every option starts with --"),
        (
            ["--workdir=w", "--step=3"],
            "ConfigError: Unknown command line flag 'step'. Did you mean: steps ?",
        ),
    ],
)
def test_a_wrong_command_line(capsys, argv, message):
    assert run(argv) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert run(argv, failure=3) == 3


def test_errors_that_end_a_tool(capsys):
    argv = ["--workdir=w"]
    assert run(argv, fails(DataError("no records"))) == 2
    assert run(argv, fails(FileNotFoundError("no file"))) == 2
    assert run(argv, fails(ModuleNotFoundError("No module named 'x'", name="x"))) == 2
    without = ModuleNotFoundError("No module named 'optuna.x'", name="optuna.x")
    assert run(argv, fails(without)) == 2
    assert run(argv, fails(KeyboardInterrupt())) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["DataError: no records", "FileNotFoundError: no file"]
    assert lines[2] == "No module named 'x'; this tool needs it: pip install 'spectral-pod[dev]'"
    assert lines[3].endswith("pip install 'spectral-pod[sweep]'")
    assert lines[4] == "Interrupted"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run(argv, lambda arguments: 1 / 0)


def writes(argv, text="new", **options):
    parser = shell.parser("status", "A tool.")
    parser.add_place("--log", local=True)
    parser.add_output("--out", "to write")
    return shell.run(parser, lambda a: shell.write(a.out, text), argv, **options)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, capsys):
    file, link = tmp_path / "a", tmp_path / "link"
    assert writes([f"--out={file}"]) == 0
    link.symlink_to(file)
    assert writes([f"--out={link}"], "newer") == 0
    assert link.is_symlink()
    assert file.read_text() == "newer"
    for flags in ([f"--log={file}", f"--out={link}"], [f"--log={link}", f"--out={file}"]):
        assert writes(flags) == 2
        assert "as is log; name another file" in capsys.readouterr().err
    assert writes(["--out=/dev/full"], "x" * 100_000) == 2
    assert "StorageError: /dev/full" in capsys.readouterr().err
    assert writes(["--out=/dev/null"]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_messages_are_no_commands_to_the_terminal(capsys):
    assert run(["--workdir=w"], fails(DataError("evil\x1b]0;\x07\udcff"))) == 2
    assert capsys.readouterr().err == "DataError: evil\\x1b]0;\\x07\\udcff\n"


def test_without_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    read = []
    assert run(["--workdir=w"], lambda arguments: read.append(sys.stdin.buffer.read())) == 0
    assert read == [b""]


def test_a_config_from_another_folder(tmp_path):
    """`configs/NAME.py` is looked up in the package where the working folder has none."""
    program = (
        "import sys; from tools import shell; p = shell.parser('x', ''); p.add_config(); "
        "sys.exit(shell.run(p, lambda a: print(a.config.data.task, a.config.seed), sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--config=configs/memory.py:copy", "--config.seed=3"]
    done = subprocess.run(
        command, cwd=tmp_path, env=trainer.environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "copy 3\n"), done.stderr
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/memory.py").write_text("raise OSError('mine')\n")
    done = subprocess.run(
        command, cwd=tmp_path, env=trainer.environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "mine" in done.stderr
