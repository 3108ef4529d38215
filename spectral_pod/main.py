"""Trains or evaluates: python -m spectral_pod.main --config=configs/quickstart.py --workdir=DIR

This file is intentionally kept short: the run itself is in `train/loop.py`.
"""

import errno
import os
import re
import sys
import traceback
from typing import Any

# etils would pick TensorFlow's file system where TensorFlow is installed; it isn't needed here.
os.environ.setdefault("EPATH_USE_TF", "false")

from absl import app, flags, logging
from ml_collections import config_flags

from spectral_pod.errors import ConfigError, UserError
from spectral_pod.parallel import runtime
from spectral_pod.train import loop

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives: a folder or a gs:// URL.")
_EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the newest sound checkpoint.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port, for several processes.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Processes of this run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Which of them this one is.")
flags.mark_flags_as_required(["config", "workdir"])

# Disks that are full or may not be written, and files where folders should be.
_CURABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}; every option starts with --")
    runtime.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    config = _CONFIG.value
    workdir: Any = _WORKDIR.value
    if config.train.compilation_cache:
        loop.enable_compilation_cache(workdir)
    logging.get_absl_handler().addFilter(_own_news)
    logging.info("Config:\n%s", config)
    loop.run(config, workdir, eval_only=_EVAL_ONLY.value)


def _own_news(record: Any) -> bool:
    """Drops what libraries log for their own developers; their warnings stay, in a line each."""
    ours = record.pathname.startswith(os.path.dirname(os.path.abspath(__file__)))
    if not ours:
        record.exc_info = None  # what ends the run is told once, at its end
    return ours or record.levelno > 20


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line and loads the config file; what is wrong there is one message."""
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value.seed  # config_flags doesn't report a missing file before the first use
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(_told(error, argv)) from error
    return rest


def _told(error: BaseException, argv: list[str]) -> str:
    while "Traceback" in str(error) and error.__context__:  # a quote of what the config file raised
        error = error.__context__
    if isinstance(error, flags.Error):
        return str(error)
    if isinstance(error, OSError):
        return f"the config file cannot be read: {str(error).splitlines()[-1].strip()}"
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    ours = [f for f in frames if not re.search("site-packages|<frozen|/main.py$", f[0])]
    if ours:
        return f"{ours[-1][0]}:{ours[-1][1]}: {type(error).__name__}: {error}"
    field = re.findall(r"\w+", str(error))[0]
    for argument in argv:
        if field in argument.partition("=")[0].split("."):
            near = re.search('Did you mean "(.*)" instead', str(error))
            hint = f"; did you mean {near[1]!r}?" if near else ""
            return f"{argument}: the configuration has no field {field!r}{hint}"
    return f"--config: {error}"


def run() -> None:
    """Runs `main`; an error that the user can cure is one message and its exit code."""
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _CURABLE:
            raise
        message = f"{type(error).__name__}: {error}; the workdir is {_WORKDIR.value}"
        print(message, file=sys.stderr, flush=True)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        message = "Interrupted; the same command continues from the newest checkpoint"
        print(message, file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    run()
