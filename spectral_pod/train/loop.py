"""A run from its configuration to its result, in order."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from spectral_pod import project_files
from spectral_pod.config import Config
from spectral_pod.errors import DataError, Preempted
from spectral_pod.parallel import backend, runtime
from spectral_pod.parallel.mesh import make_mesh, on_mesh
from spectral_pod.parallel.runtime import print_once
from spectral_pod.train import starts
from spectral_pod.train.checkpoint import Checkpointer
from spectral_pod.train.event_files import how_to_view
from spectral_pod.train.goodput import Stopwatch
from spectral_pod.train.optim import evaluated
from spectral_pod.train.sealed_steps import SealedSteps
from spectral_pod.train.sources import Sources, open_sources
from spectral_pod.train.state import check_finite, params_digest
from spectral_pod.train.trainer import Trainer
from spectral_pod.validation import validate, validate_mesh


def run(
    config: Config, workdir: str, *, eval_only: bool = False, sources: Sources | None = None
) -> dict[str, Any]:
    """Trains to `config.train.total_steps`, continuing what is in `workdir`; returns the result.

    With `eval_only` evaluates the newest sound checkpoint and writes nothing. `sources` take the
    place of the data that the configuration names.

    Raises:
      UserError: see `errors.py`; whatever was checkpointed before stays.
    """
    started, stopwatch = time.time(), Stopwatch()
    validate(config)
    runtime.preemption.seconds = config.checkpoint.preemption_seconds

    # ---- mesh
    with stopwatch.time("start"):
        runtime.compare("configuration and code", starts.facts(config))
        backend.check_platform()
        mesh = make_mesh(validate_mesh(config, jax.device_count()))
    device = jax.devices()[0].device_kind
    print_once(f"mesh {dict(mesh.shape)} of {mesh.size} {device} device(s)")

    # ---- data
    with stopwatch.time("data_preparation"):
        sources = open_sources(config) if sources is None else sources
        train_source = sources.training()
        splits = ("validation", config.train.eval_split)
        eval_sources = {split: sources.evaluation(split) for split in splits}
    of_run = functools.partial(
        starts.claim_workdir,
        workdir,
        config,
        sources.digest,
        sources.classes,
        former_digests=sources.former_digests,
    )

    def start(checkpointer: SealedSteps) -> Trainer:
        return Trainer(
            config, workdir, mesh, sources, train_source, eval_sources, checkpointer, stopwatch
        )

    if eval_only:
        run = of_run(read_only=True) if runtime.is_leader() else ""
        return _evaluate_only(start(SealedSteps(f"{workdir}/checkpoints", run)))

    with contextlib.ExitStack() as stack:
        # ---- model, optimizer, state
        with stopwatch.time("setup"):
            check_lease = stack.enter_context(starts.hold(workdir))
            run = of_run() if runtime.is_leader() else ""
            runtime.barrier("workdir")
            trainer = start(_checkpointer(config, workdir, run, check_lease))
            if not trainer.restore():
                with starts.released_on_error(workdir):
                    trainer.initialize()
            trainer.report_start()

        # ---- steps, evaluation, result
        with trainer.running(check_lease):
            trainer.compile()
            try:
                trainer.train()
                split = config.train.eval_split
                # Where this is the validation split, the last step may have been validated already.
                known = trainer.validation if split == "validation" else None
                evaluation = known or trainer.evaluate(split)
                # For a time that is each process's own.
                sources.wait_verified(functools.partial(trainer.check_for_shutdown, together=False))
            except Preempted:
                trainer.save_and_exit()
            if not known:
                trainer.report_evaluation(split, evaluation)
            result = _report(trainer, evaluation, started)
    runtime.barrier("the end")  # what the leader still writes may take longer than disconnecting
    return result


def _checkpointer(
    config: Config, workdir: str, run: str, check_lease: Callable[[], None]
) -> Checkpointer:
    return Checkpointer(
        f"{workdir}/checkpoints",
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
        best_metric="score",
        run=run,
        check_lease=check_lease,
    )


def _evaluate_only(trainer: Trainer) -> dict[str, Any]:
    """Evaluates the newest sound checkpoint; writes nothing.

    Raises:
      DataError: there is none.
      NonFiniteError: its parameters are not finite.
    """
    if not trainer.restore():
        raise DataError(f"{trainer.workdir} holds no sound checkpoint to evaluate; train first")
    check_finite(evaluated(trainer.state), f"step {trainer.step} of {trainer.workdir}")
    split, objective = trainer.config.train.eval_split, trainer.sources.objective
    with on_mesh(trainer.mesh):
        evaluation = trainer.evaluate_only(split)
    trainer.sources.wait_verified()
    print_once(f"step {trainer.step} {objective.eval_line(split, evaluation)}")
    for text in objective.details(evaluation, trainer.sources.classes):
        print_once(text)
    return {"step": trainer.step, "eval": evaluation}


def _report(trainer: Trainer, evaluation: dict[str, Any], started: float) -> dict[str, Any]:
    """Writes `result.json` and prints the closing report.

    Args:
      started: when the run was, in seconds since 1970.
    """
    split, sources = trainer.config.train.eval_split, trainer.sources
    objective = sources.objective
    trainer.checkpointer.wait_until_finished()
    task_facts, task_lines = sources.task.report(evaluation, sources.provenance)
    result = {
        "step": trainer.step,
        "eval": {"split": split} | evaluation | objective.scalars(evaluation),
        "params_digest": params_digest(trainer.state.params),
        "bytes_per_second": trainer.progress.bytes_per_second(),
        "wall_seconds": time.time() - started,
        "num_params": trainer.num_params,
        "operations": {name: choice.method for name, choice in trainer.operations.items()},
    } | task_facts
    details = objective.details(evaluation, sources.classes)
    if details:
        trainer.writer.texts(
            trainer.step, {f"{split}/details": "\n".join(("```", *details, "```"))}
        )
    for text in (*details, *task_lines):
        print_once(text)
    file = epath.Path(trainer.workdir) / "result.json"
    if runtime.is_leader():
        project_files.RESULT.write(file, result)
    print_once(f"{split} {objective.line(evaluation)}; see {file}")
    print_once(f"curves: {how_to_view(trainer.workdir)}")
    return result
