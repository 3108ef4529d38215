"""How every tool starts and ends: its command line, its errors and its exit code.

A tool is a module with a `main` that returns its exit code:

    def main(argv: Sequence[str]) -> int:
        return shell.run(_parser(), export_model, argv)

`--help` prints the module's docstring and the flags. An error that the user can fix is one line on
stderr and an exit code of `spectral_pod/errors.py`; any other error is a bug, with its traceback.
stdout is for what the tool produces, stderr for progress.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from spectral_pod import fields, storage
from spectral_pod.errors import ConfigError, UserError

# Some tools must start fast: neither JAX nor what imports it is imported here.


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are `ConfigError`s."""

    def __init__(self, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> Any:
        raise ConfigError(message)

    def add_value(self, flag: str, annotation: Any, default: Any = None, help: str = "") -> None:
        """Adds a flag whose values are checked as fields are: `annotation` is from `fields.py`."""

        def parse(text: str) -> Any:
            return fields.parse(annotation, text, flag)

        metavar = flag.lstrip("-").upper()
        self.add_argument(flag, type=parse, default=default, help=help, metavar=metavar)

    def add_config(self) -> None:
        """Adds --config=FILE and --config.FIELD=VALUE.

        The parsed `config` is the configuration, and `config_flags` holds these flags as given.
        """
        text = "a file in configs/; --config.FIELD=VALUE overrides one of its fields"
        self.add_argument("--config", required=True, metavar="FILE[:PRESET]", help=text)


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
    try:
        return main(_parse(parser, argv)) or 0
    except KeyboardInterrupt:
        say(interrupted)
        return 130
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and not _is_ours(error):
            say(f"{error}; this tool needs it: pip install 'spectral-pod[dev]'")
        elif isinstance(error, (UserError, *storage.failures())):
            say(f"{type(error).__name__}: {error}")
        else:
            raise
        code = getattr(error, "exit_code", UserError.exit_code)
        return code if failure is None else failure


def say(line: str) -> None:
    """Prints one line on stderr, in one piece: threads report there as well."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    arguments, rest = parser.parse_known_args(argv)
    if "config" in arguments:
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
    from ml_collections import config_flags

    from spectral_pod import command_line

    holder = config_flags.DEFINE_config_file(
        "config", None, "A file in configs/.", allow_override=True
    )
    _, *rest = command_line.parser(holder)(["tool", *argv])
    return holder.value, rest


def _is_ours(error: ModuleNotFoundError) -> bool:
    return (error.name or "").partition(".")[0] in ("spectral_pod", "tools")
