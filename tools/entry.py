"""How a tool without a --config starts and ends: its flags, and errors that the user can cure."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from spectral_pod.errors import ConfigError, UserError
from spectral_pod.parallel import runtime


def run(main: Callable[[], None]) -> None:
    """Runs `main`; an error that the user can cure is one message and its exit code."""

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise ConfigError(f"unexpected argument {argv[1]!r}; every option starts with --")
        logging.set_verbosity(logging.WARNING)
        runtime.initialize(None, 1, 0)
        main()

    try:
        app.run(start, flags_parser=_parse)
    except (UserError, OSError) as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(getattr(error, "exit_code", UserError.exit_code))
    except KeyboardInterrupt:
        say("Interrupted")
        sys.exit(130)


def say(line: str) -> None:
    """One line on stderr: stdout is for what the tool makes."""
    print(line, file=sys.stderr, flush=True)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise ConfigError(str(error)) from error
