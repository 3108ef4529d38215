"""The command line of everything that takes `--config=FILE.py`."""

import os
import pathlib
import re
import traceback
from collections.abc import Callable

from absl import flags

from spectral_pod.errors import ConfigError, UserError


def parser(config: flags.FlagHolder) -> Callable[[list[str]], list[str]]:
    """Parses a command line and loads its config file, for `app.run`.

    What is wrong there becomes a `ConfigError` of one message.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS([find_config(argument) for argument in argv])
            _ = config.value.seed  # config_flags doesn't report a missing file before its first use
        except UserError:
            raise
        except Exception as error:
            raise ConfigError(_told(error, argv)) from error
        return rest

    return parse


def find_config(argument: str) -> str:
    """Replaces a `configs/NAME.py` that the working folder lacks by the one that is installed."""
    match = re.fullmatch(r"(--?config=)?(configs/[^:]*)(:.*)?", argument)
    if match and not os.path.exists(match[2]):
        package = pathlib.Path(__file__).parent
        for folder in (package, package.parent):  # of a wheel, of the repository
            if (folder / match[2]).is_file():
                return f"{match[1] or ''}{folder / match[2]}{match[3] or ''}"
    return argument


def _told(error: BaseException, argv: list[str]) -> str:
    while "Traceback" in str(error) and error.__context__:  # a quote of what the config file raised
        error = error.__context__
    if isinstance(error, flags.Error):
        return str(error)
    if isinstance(error, OSError):
        return f"the config file cannot be read: {str(error).splitlines()[-1].strip()}"
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    ours = [f for f in frames if not re.search("site-packages|<frozen|/command_line.py$", f[0])]
    if ours:
        return f"{ours[-1][0]}:{ours[-1][1]}: {type(error).__name__}: {error}"
    field = re.findall(r"\w+", str(error))[0]
    for argument in argv:
        if field in argument.partition("=")[0].split("."):
            near = re.search('Did you mean "(.*)" instead', str(error))
            hint = f"; did you mean {near[1]!r}?" if near else ""
            return f"{argument}: the configuration has no field {field!r}{hint}"
    return f"--config: {error}"
