"""A run, told in order: mesh, data, model, state, steps, result."""

import collections
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spectral_pod import config as config_lib
from spectral_pod import models, storage
from spectral_pod.data import pipeline, tasks
from spectral_pod.errors import DataError, NonFiniteError, Preempted
from spectral_pod.generate import decode
from spectral_pod.layers.block import unstack
from spectral_pod.layers.mixers import can_be_causal
from spectral_pod.parallel import runtime
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.parallel.runtime import say
from spectral_pod.parallel.sharding import batch_sharding, num_shards
from spectral_pod.train import starts
from spectral_pod.train.checkpoint import Checkpointer
from spectral_pod.train.evaluate import confusion_table, evaluate
from spectral_pod.train.metrics import derived, scores_of, summary
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.profile import Profiler
from spectral_pod.train.progress import BadStepError, Progress, eval_line
from spectral_pod.train.sources import Sources, open_sources
from spectral_pod.train.state import TrainState, abstract_state, init_state
from spectral_pod.train.step import abstract_batch, jit_eval_step, jit_train_step
from spectral_pod.train.watchdog import Watchdog
from spectral_pod.train.writers import MetricWriter


def run(config: ConfigDict, workdir: str, *, eval_only: bool = False) -> dict[str, Any]:
    """Trains to `config.train.total_steps`, continuing what is in `workdir`; returns the result.

    With `eval_only` evaluates the newest sound checkpoint and writes nothing.

    Raises:
      UserError: see `errors.py`; whatever was checkpointed before stays.
    """
    started = time.time()
    config_lib.validate(config, tasks=tasks.TASKS, models=models.MODELS, mixers=can_be_causal())
    runtime.preemption.seconds = config.checkpoint.preemption_seconds
    runtime.compare("configuration and code", starts.facts(config))

    # ---- mesh
    runtime.check_platform()
    mesh = make_mesh(config_lib.validate_mesh(config, jax.device_count(), models=models.MODELS))
    say(f"mesh {dict(mesh.shape)} of {mesh.size} {jax.devices()[0].device_kind} device(s)")

    # ---- data
    sources = open_sources(config)
    train_batches = sources.training()
    eval_sets = {
        split: sources.evaluation(split) for split in ("validation", config.train.eval_split)
    }
    if runtime.is_leader() and not eval_only:
        config_lib.claim_workdir(workdir, config, sources.digest, sources.classes)

    # ---- model, optimizer, state
    model = models.build(
        config,
        seq_len=config.data.seq_len,
        num_classes=sources.num_classes,
        vocab_size=sources.vocab_size,
    )
    tx = make_optimizer(config)
    abstract = abstract_state(model, tx, mesh, config_lib.row_len(config))
    num_params = sum(x.size for x in jax.tree.leaves(abstract.params))
    checkpointer = Checkpointer(
        f"{workdir}/checkpoints",
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
        best_metric="score",
    )
    state: Any = checkpointer.restore(abstract)
    if eval_only:
        if state is None:
            raise DataError(f"{workdir} holds no sound checkpoint to evaluate; train first")
        return _evaluate_only(state, abstract, model, mesh, config, sources)
    if state is None:
        state = init_state(model, tx, mesh, config_lib.row_len(config), config.seed)
        if config.train.on_bad_step == "rollback":
            checkpointer.save(0, state, None)  # there is always something to go back to
    first_step = int(state.step)
    overview = parameter_overview.get_parameter_overview(abstract.params, include_stats=False)
    logging.info("Parameters:\n%s", overview)
    with jax.set_mesh(mesh):
        operations = models.operations(config, seq_len=config.data.seq_len)
    say(f"{config.model.name}: {num_params:,} parameters, starting at step {first_step}")
    say(f"operations: {', '.join(f'{name} by {how}' for name, how in operations.items())}")
    for change in starts.record_start(workdir, mesh, first_step):
        say(change)

    def report_stall(stacks: Mapping[str, str]) -> None:
        writer.texts(step, stacks)
        writer.flush()  # the process is about to leave

    # ---- steps
    with (
        jax.set_mesh(mesh),
        runtime.Interrupt() as interrupt,
        checkpointer,
        contextlib.closing(
            MetricWriter(
                workdir,
                is_leader=runtime.is_leader(),
                resume_step=first_step,
                wandb_project=config.train.wandb_project,
                run_config=config.to_dict(),
            )
        ) as writer,
        contextlib.closing(
            Profiler(workdir, config.train.profile_steps, runtime.this_process())
        ) as profiler,
        Watchdog(
            workdir,
            factor=config.train.stall_factor,
            seconds=config.train.stall_seconds,
            report=report_stall,
        ) as watchdog,
        runtime.leaving_the_dead(),
    ):
        if first_step == 0:
            writer.texts(
                0, {"config": f"```\n{config}\n```", "parameters": f"```\n{overview}\n```"}
            )
        eval_step = jit_eval_step(model, mesh, abstract)
        sampler = _sampler(config, mesh, sources)
        progress = Progress(config, workdir, mesh, abstract, sources, writer, first_step)
        step, total_steps = first_step, config.train.total_steps
        num_rollbacks: dict[int, int] = collections.Counter()  # by the step that was gone back to

        def is_due(every_steps: int) -> bool:
            return step % every_steps == 0 or step == total_steps

        def still_wanted() -> None:
            """Between any two steps or batches: whoever wants the run to end is heard."""
            watchdog.beat()
            interrupt.check()
            if runtime.preemption.reached():
                raise Preempted

        def run_eval(split: str) -> dict[str, Any]:
            with progress.time("eval"):
                return evaluate(
                    eval_step,
                    state.params,
                    eval_sets[split],
                    mesh,
                    threads=config.data.threads,
                    prefetch=config.data.prefetch,
                    before_batch=still_wanted,
                )

        def run_validation() -> dict[str, float]:
            validation = run_eval("validation")
            progress.report_eval("validation", step, validation)
            if sampler is not None:
                with progress.time("sample"):
                    writer.texts(step, {"sample": sampler(state.params)})
            return scores_of(sources.objective.name, validation)

        def batches_from(step: int) -> Iterator[Any]:
            return pipeline.load(
                train_batches,
                batch_sharding(mesh),
                step,
                total_steps,
                threads=config.data.threads,
                prefetch=config.data.prefetch,
            )

        def roll_back(bad: BadStepError) -> TrainState:
            """The newest checkpoint, put behind the batch of the bad step."""
            state: Any = checkpointer.restore(abstract)
            newest = int(state.step)
            num_rollbacks[newest] += 1
            if num_rollbacks[newest] > config.train.max_bad_steps:
                raise NonFiniteError(
                    f"{bad}; step {newest} was gone back to {config.train.max_bad_steps} times, as "
                    "often as config.train.max_bad_steps allows. Its checkpoint is kept"
                )
            progress.restart(bad.step)
            writer.scalars(bad.step, {"rollback_to": newest})
            say(f"{bad}; continuing behind it with the state of step {newest}")
            return state.replace(step=state.step + np.int32(bad.step - newest))

        with progress.time("compile"):
            train_step = _compile(
                jit_train_step(model, tx, config, mesh, abstract), abstract, mesh, config, sources
            )
        batches = batches_from(step)
        try:
            if step and is_due(config.train.eval_every_steps) and not checkpointer.metrics(step):
                checkpointer.add_metrics(step, run_validation())  # it was cut off by SIGTERM
            progress.restart(step)
            while step < total_steps:
                still_wanted()
                try:
                    with progress.time("data"):
                        batch = next(batches)
                    checkpointer.check()  # a save that failed in the background ends the run now
                    with profiler.step(step + 1), progress.time_step():
                        state, metrics = train_step(state, batch)
                        step += 1
                        progress.add(step, metrics)
                    runtime.preemption.something_to_save = True
                    if is_due(config.train.eval_every_steps) or is_due(
                        config.checkpoint.every_steps
                    ):
                        progress.settle()  # only a state whose step is known to be sound is saved
                        progress.no_host_time()
                except BadStepError as bad:
                    state, step = roll_back(bad), bad.step
                    batches = batches_from(step)
                scores = run_validation() if is_due(config.train.eval_every_steps) else None
                if is_due(config.checkpoint.every_steps):
                    writer.flush()
                    with progress.time("checkpoint"):
                        checkpointer.save(step, state, scores)
            result = run_eval(config.train.eval_split)
        except Preempted:
            saved = "the newest checkpoint"
            with contextlib.suppress(BadStepError):  # nothing sound to save, then
                progress.settle()
                checkpointer.save(step, state, None)
                saved = f"step {step}"
            checkpointer.wait_until_finished()
            runtime.barrier("saved")  # and sealed, by the leader
            raise Preempted(
                f"SIGTERM came; {saved} is saved, and the same command continues from it"
            ) from None

        # ---- result
        progress.report_eval(config.train.eval_split, step, result)
        checkpointer.wait_until_finished()
        run_facts = {"num_params": num_params, "operations": operations}
        result = _finish(workdir, config, sources, state, result, progress, run_facts, started)
    runtime.barrier("the end")  # what the leader still writes may take longer than parting does
    return result


def params_digest(params: Any) -> str:
    """sha256 over the bytes of every parameter, in the order of their names."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(leaves):
        whole = multihost_utils.process_allgather(leaves[name], tiled=True)
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()


def _compile(
    jitted: Any, abstract: TrainState, mesh: Mesh, config: ConfigDict, sources: Sources
) -> Callable[[TrainState, Any], Any]:
    """The compiled training step, once all processes are known to have the same one."""
    rows, row_len = config.train.global_batch_size, config_lib.row_len(config)
    by_position = sources.objective.name != "class"
    lowered = jitted.lower(abstract, abstract_batch(rows, row_len, mesh, by_position=by_position))
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    runtime.compare("program and data", {"program": program, "data": sources.digest})
    return lowered.compile()


def _sampler(config: ConfigDict, mesh: Mesh, sources: Sources) -> Callable[[Any], str] | None:
    """From parameters to a Markdown text that a language model writes; None for other models."""
    if sources.objective.name != "next" or not config.train.sample_bytes:
        return None
    model = models.build(
        config,
        seq_len=config.data.seq_len,
        num_classes=sources.num_classes,
        vocab_size=sources.vocab_size,
        decoding=True,
    )
    prompt = config.train.sample_prompt.encode()

    def sample(params: Any) -> str:
        pieces = decode.generate(
            model,
            unstack(params),
            [prompt],
            num_bytes=config.train.sample_bytes,
            seed=config.seed,
            context=decode.context_of(model),
            rows=num_shards("batch"),
        )
        text = prompt + b"".join(piece for (piece,) in pieces)
        return "```\n" + text.decode(errors="replace") + "\n```"

    return sample


def _evaluate_only(
    state: TrainState,
    abstract: TrainState,
    model: Any,
    mesh: Mesh,
    config: ConfigDict,
    sources: Sources,
) -> dict[str, Any]:
    split = config.train.eval_split
    with jax.set_mesh(mesh):
        result = evaluate(
            jit_eval_step(model, mesh, abstract),
            state.params,
            sources.evaluation(split),
            mesh,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
        )
    say(f"step {int(state.step)} {eval_line(split, sources.objective.name, result)}")
    if "confusion" in result:
        say(confusion_table(result["confusion"], sources.classes))
    return {"step": int(state.step), "eval": result}


def _finish(
    workdir: str,
    config: ConfigDict,
    sources: Sources,
    state: TrainState,
    evaluation: dict[str, Any],
    progress: Progress,
    run_facts: Mapping[str, Any],
    started: float,
) -> dict[str, Any]:
    """Writes `result.json` and prints the closing report."""
    split, objective = config.train.eval_split, sources.objective.name
    result = {
        "step": int(state.step),
        "eval": {"split": split} | evaluation | derived(objective, evaluation),
        "params_digest": params_digest(state.params),
        "bytes_per_second": progress.bytes_per_second(),
        "wall_seconds": time.time() - started,
    } | dict(run_facts)
    if "confusion" in evaluation:
        say(confusion_table(evaluation["confusion"], sources.classes))
    added, lines = sources.task.report(evaluation, sources.provenance)
    result |= added
    for line in lines:
        say(line)
    file = epath.Path(workdir) / "result.json"
    if runtime.is_leader():
        storage.write_whole(file, json.dumps(result, indent=1))
    say(f"{split} {summary(objective, derived(objective, evaluation))}; see {file}")
    say(f"curves: .venv/bin/tensorboard --logdir={workdir}")
    return result


def enable_compilation_cache(workdir: str) -> None:
    """Keeps compiled programs in the workdir, so that a restart starts at once."""
    jax.config.update("jax_compilation_cache_dir", os.path.join(workdir, "compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    # XLA's own caches would make the path a part of every key: a moved workdir compiled anew.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
