"""Trains or evaluates: python -m spectral_pod.main --config=configs/quickstart.py --workdir=DIR

A config file is Python code and is executed; the exit codes are in `errors.py`. This file is
intentionally kept short: the run itself is in `train/loop.py`.
"""

import os
import traceback
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from spectral_pod import command_line, errors, storage, streams
from spectral_pod.errors import ConfigError, UserError
from spectral_pod.parallel import runtime
from spectral_pod.train import loop

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or gs:// URL of the run.")
_EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the newest sound checkpoint.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
_BIND = flags.DEFINE_string("coordinator_bind_address", None, "ip:port that process 0 listens on.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}; every option starts with --")
    runtime.preemption.listen()
    runtime.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _BIND.value)
    config = _CONFIG.value
    workdir = storage.place(_WORKDIR.value, "--workdir")
    storage.check_access(workdir, write=not _EVAL_ONLY.value)
    if config.train.compilation_cache:
        runtime.enable_compilation_cache(workdir, read_only=_EVAL_ONLY.value)
    logging.get_absl_handler().addFilter(_drop_library_info)
    logging.info("Config:\n%s", config)
    loop.run(config, workdir, eval_only=_EVAL_ONLY.value)


def _drop_library_info(record: Any) -> bool:
    """Drops what libraries log at level info; their warnings stay, without tracebacks."""
    ours = record.pathname.startswith(os.path.dirname(os.path.abspath(__file__)))
    if not ours:
        record.exc_info = None  # the error that ends the run is printed at its end
    return ours or record.levelno > 20


def run() -> None:
    """Runs `main`; an error ends all processes with one message and its exit code.

    Of a bug the whole traceback is printed.
    """
    streams.outlast_readers()
    try:
        with runtime.exit_on_peer_loss():
            app.run(main, flags_parser=command_line.parser(_CONFIG))
    except KeyboardInterrupt:
        runtime.end(130, "Interrupted; the same command continues from the newest checkpoint")
    except UserError as error:
        runtime.end(error.exit_code, f"{type(error).__name__}: {error}")
    except Exception as error:
        fault = errors.storage_error(error)
        if fault is not None:  # of a library that no code here wrapped
            message = f"{type(fault).__name__}: {fault}; the workdir is {_WORKDIR.value}"
            runtime.end(fault.exit_code, message)
        runtime.end(1, traceback.format_exc())


if __name__ == "__main__":
    run()
