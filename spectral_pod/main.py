"""Trains or evaluates: python -m spectral_pod.main --config=configs/quickstart.py --workdir=DIR

This file is intentionally kept short: the run itself is in `train/loop.py`.
"""

import os
import sys
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
    """Drops what libraries log for their own developers; their warnings stay."""
    return record.levelno > 20 or "spectral_pod" in record.pathname


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError) as error:  # a field that the config doesn't have
        raise ConfigError(f"--config override: {error.args[0]}") from error


def run() -> None:
    """Runs `main`; an error that the user can cure is one message and its exit code."""
    try:
        app.run(main, flags_parser=_parse_flags)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run()
