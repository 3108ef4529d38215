"""Trains or evaluates: python -m spectral_pod.main --config=configs/quickstart.py --workdir=DIR

Every field of a config is a flag, --config.FIELD=VALUE; `config.py` lists them with their meaning.
A config file is Python code and is executed; the exit codes are in `errors.py`, and the run itself
is in `train/loop.py`.
"""

import os
import traceback
from typing import Any

from absl import app, flags, logging

from spectral_pod import command_line, errors, storage, streams
from spectral_pod.errors import UserError
from spectral_pod.parallel import backend, runtime
from spectral_pod.train import loop

_FLAGS = command_line.trainer_flags()
flags.adopt_module_key_flags(command_line)  # --help lists them


def main(argv: list[str]) -> None:
    command_line.refuse_positional(argv[1:])
    runtime.preemption.listen()
    if _FLAGS.stop_after_minutes.value:
        runtime.preemption.stop_after(_FLAGS.stop_after_minutes.value)
    runtime.initialize(
        _FLAGS.coordinator_address.value,
        _FLAGS.num_processes.value,
        _FLAGS.process_id.value,
        _FLAGS.coordinator_bind_address.value,
    )
    config, eval_only = _FLAGS.config.value, _FLAGS.eval_only.value
    workdir = storage.place(_FLAGS.workdir.value, "--workdir")
    storage.check_access(workdir, write=not eval_only)
    if config.train.compilation_cache:
        backend.enable_compilation_cache(workdir, read_only=eval_only)
    logging.get_absl_handler().addFilter(_drop_library_info)
    loop.run(config, workdir, eval_only=eval_only)


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
            app.run(main, flags_parser=command_line.parser(_FLAGS.config))
    except KeyboardInterrupt:
        runtime.end(130, "Interrupted; the same command continues from the newest checkpoint")
    except UserError as error:
        runtime.end(error.exit_code, f"{type(error).__name__}: {error}")
    except Exception as error:
        fault = errors.storage_error(error)
        if fault is not None:  # of a library that no code here wrapped
            message = f"{type(fault).__name__}: {fault}; the workdir is {_FLAGS.workdir.value}"
            runtime.end(fault.exit_code, message)
        runtime.end(1, traceback.format_exc())


if __name__ == "__main__":
    run()
