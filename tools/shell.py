"""How every tool starts and ends: its command line, its errors and its exit code.

A tool is a module with a `main` that returns its exit code:

    def main(argv: Sequence[str]) -> int:
        return shell.run(_parser(), export_model, argv)

`--help` prints the module's docstring and the flags. An error that the user can fix is one line on
stderr and an exit code of `spectral_pod/errors.py`; any other error is a bug, with its traceback.
stdout is for what the tool produces, stderr for progress. A reader of stdout that leaves, such as
`head -1`, ends a tool silently, with the code of a broken pipe (141).
"""

import argparse
import contextlib
import difflib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from spectral_pod import errors, fields, storage
from spectral_pod.errors import ConfigError, DataError, UserError

# Some tools must start fast: neither JAX nor what imports it is imported here.

# The extra of pyproject.toml that has a module; any other is for development.
_EXTRAS = {"matplotlib": "plots", "optuna": "sweep", "bm25s": "rag"}
_BROKEN_PIPE = 141  # as shells report a process that SIGPIPE ended


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are `ConfigError`s."""

    def __init__(self, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> Any:
        raise ConfigError(message)

    def _get_values(self, action: argparse.Action, texts: list[str]) -> Any:
        if texts == ["--"] and action.option_strings and action.nargs is None:
            value = self._get_value(action, *texts)  # argparse takes it for the end of the flags
            self._check_value(action, value)
            return value
        return super()._get_values(action, texts)  # type: ignore[misc]

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        # A command is given all that follows it, which its own parser checks.
        is_command = isinstance(action, argparse._SubParsersAction)
        if action.type is None and not is_command and not _is_unicode(text):
            name = "/".join(action.option_strings) or action.dest
            raise ConfigError(f"{name} is {text!r}; it must be text in UTF-8")
        return super()._get_value(action, text)  # type: ignore[misc]

    def add_value(self, flag: str, annotation: Any, default: Any = None, help: str = "") -> None:
        """Adds a flag whose values are checked as fields are: `annotation` is from `fields.py`."""

        def parse(text: str) -> Any:
            return fields.parse(annotation, text, flag)

        metavar = flag.lstrip("-").upper()
        self.add_argument(flag, type=parse, default=default, help=help, metavar=metavar)

    def add_place(
        self, flag: str, *, root: bool = False, local: bool = False, **options: Any
    ) -> None:
        """Adds a flag, or a positional argument, that names a place: see `storage.place`.

        `options` are those of `add_argument`.
        """

        def parse(text: str) -> str:
            return storage.place(text, flag, root=root, local=local)

        self.add_argument(flag, type=parse, **options)

    def add_output(self, flag: str, help: str, *, required: bool = False) -> None:
        """Adds a flag that names a local file, for `write`.

        Whether it can be written is tried before the tool's work; it must not be what another flag
        names.
        """

        def parse(text: str) -> str:
            file = storage.place(text, flag, local=True)
            folder = os.path.dirname(os.path.realpath(file))
            if not os.path.isdir(folder):
                raise ConfigError(f"{flag} is {text!r}, and there is no folder {folder!r}")
            if os.path.isdir(file):
                raise ConfigError(f"{flag} is {text!r}, which is a folder; name a file in it")
            written = [file] if os.path.exists(file) else []
            written += [] if _is_special(file) else [folder]  # where another file takes its place
            if not all(os.access(path, os.W_OK) for path in written):
                raise ConfigError(f"{flag} is {text!r}, which you may not write")
            return _Output(file)

        self.add_argument(flag, type=parse, metavar="FILE", help=help, required=required)

    def add_config(self, *, required: bool = True) -> None:
        """Adds --config=FILE and --config.FIELD=VALUE.

        The parsed `config` is the configuration, or None without one, and `config_flags` holds
        these flags as given.
        """
        text = "a file in configs/; --config.FIELD=VALUE overrides one of its fields"
        self.add_argument("--config", required=required, metavar="FILE[:PRESET]", help=text)


def parser(name: str, doc: str | None) -> Parser:
    """The command line of `python -m tools.NAME`, whose module has the docstring `doc`."""
    package = __package__ or "tools"  # spectral_pod.tools where it is installed
    description = (doc or "").replace("python -m tools.", f"python -m {package}.")
    return Parser(prog=f"python -m {package}.{name}", description=description)


def run(
    parser: Parser,
    main: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str],
    *,
    failure: int | None = None,
    interrupted: str = "Interrupted",
) -> int:
    """Parses `argv`, runs `main` and returns the exit code.

    Args:
      main: returns an exit code; None is 0.
      failure: the exit code of every error that the user can fix, in place of the error's own.
      interrupted: what Ctrl-C prints.
    """
    _ready_streams()
    try:
        code = main(_parse(parser, argv)) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say(interrupted)
        return 130
    except BrokenPipeError:
        _leave_pipes()
        return _BROKEN_PIPE
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and not _is_ours(error):
            extra = _EXTRAS.get(str(error.name).partition(".")[0], "dev")
            say(f"{error}; this tool needs it: pip install 'spectral-pod[{extra}]'")
        elif isinstance(error, (UserError, *storage.failures())) or errors.storage_error(error):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            say(f"{type(error).__name__}: {'; '.join(lines)}")
        else:
            raise
        code = getattr(error, "exit_code", UserError.exit_code)
        return code if failure is None else failure


def say(line: str) -> None:
    """Prints one line on stderr, in one piece: threads report there as well."""
    sys.stderr.write(f"{printable(line)}\n")
    sys.stderr.flush()


def printable(text: str | bytes) -> str:
    """Text of others; what is not printable in it is escaped, as it may be a command to the
    terminal.
    """
    decoded = text if isinstance(text, str) else text.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in decoded)


def in_line(text: str | bytes) -> str:
    """The same as one line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def indented(text: str | bytes) -> str:
    """The same with every line but the first indented, so that none is taken for one of ours."""
    return printable(text).replace("\n", "\n    ")


def write(file: str, text: str) -> None:
    """Writes the file of a flag of `Parser.add_output`: whole, or what was there stays.

    Raises:
      StorageError: it cannot be written.
    """
    if _is_special(file):
        with errors.naming(file), open(file, "w", encoding="utf-8") as out:
            out.write(text)
    else:
        storage.write_whole(epath.Path(os.path.realpath(file)), text)


def read_texts(file: str, field: str) -> list[bytes]:
    """The texts of a file of lines {FIELD: TEXT}; empty lines do not count.

    Raises:
      DataError: a line is something else, or there are none.
    """
    texts = []
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field].encode()
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                text = b""
            if not text:
                raise DataError(
                    f'{file}:{number} is not {{"{field}": TEXT}} with at least one byte of text'
                )
            texts.append(text)
    if not texts:
        raise DataError(f'{file} holds no lines {{"{field}": TEXT}}')
    return texts


class _Output(str):
    """The name of a file to write."""


def _is_special(file: str) -> bool:
    """Whether it is a device or a pipe, in whose place no other file can be put."""
    return os.path.exists(file) and not os.path.isfile(file)


def _check_outputs(arguments: argparse.Namespace) -> None:
    names = {name: value for name, value in vars(arguments).items() if isinstance(value, str)}
    for name, file in names.items():
        if not isinstance(file, _Output) or not os.path.isfile(file):
            continue
        for other, value in names.items():
            if other != name and os.path.exists(value) and os.path.samefile(value, file):
                raise ConfigError(f"--{name} is {file!r}, as is {other}; name another file")


def _ready_streams() -> None:
    """Makes stdout and stderr take any text, and discard it where the tool was started without;
    then stdin is empty.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="backslashreplace")


def _leave_pipes() -> None:
    """What is still in the buffers of stdout and stderr goes nowhere, without another error."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is no file
            os.dup2(null, stream.fileno())


def _parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    arguments, rest = parser.parse_known_args(argv)
    _check_outputs(arguments)
    if getattr(arguments, "config", None) is not None:
        arguments.config_flags = [f"--config={arguments.config}", *rest]
        arguments.config, rest = _load_config(arguments.config_flags)
    for argument in rest:
        if not argument.startswith("-"):
            raise ConfigError(f"unexpected argument {argument!r}; every option starts with --")
        flag = argument.lstrip("-").partition("=")[0]
        known = [name.lstrip("-") for name in parser._option_string_actions]
        near = difflib.get_close_matches(flag, known, n=1)
        hint = f". Did you mean: {near[0]} ?" if near else ""
        raise ConfigError(f"Unknown command line flag {flag!r}{hint}")
    return arguments


def _load_config(argv: list[str]) -> tuple[Any, list[str]]:
    """The configuration, and the arguments that are not of it."""
    from absl import flags

    from spectral_pod import command_line

    values = flags.FlagValues()  # of this command line alone
    holder = command_line.config_flag(values)
    _, *rest = command_line.parser(holder, values)(["tool", *argv])
    return holder.value, rest


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_ours(error: ModuleNotFoundError) -> bool:
    return (error.name or "").partition(".")[0] in ("spectral_pod", "tools")
