"""The trainer: the state of a training run, and its verbs as methods."""

import collections
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh

from spectral_pod import config as config_lib
from spectral_pod import models, project_files
from spectral_pod.config import Config
from spectral_pod.data import pipeline
from spectral_pod.errors import NonFiniteError, Preempted
from spectral_pod.generate.restore import Trained
from spectral_pod.generate.text import continuations
from spectral_pod.layers.block import unstack
from spectral_pod.parallel import runtime
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.shapes import PAD
from spectral_pod.train import examples, start_from, starts
from spectral_pod.train.evaluate import evaluate
from spectral_pod.train.goodput import Stopwatch
from spectral_pod.train.optim import evaluated, make_optimizer
from spectral_pod.train.probes import Prober
from spectral_pod.train.profile import Profiler
from spectral_pod.train.progress import BadStepError, Progress
from spectral_pod.train.sources import Sources
from spectral_pod.train.state import abstract_state, init_state, state_of
from spectral_pod.train.step import abstract_batch, jit_eval_step, jit_train_step
from spectral_pod.train.watchdog import Watchdog
from spectral_pod.train.writers import MetricWriter


class Trainer:
    """Trains one model in one workdir. All processes call the same methods in the same order.

    Attributes:
      state: the `TrainState`, after `restore` or `initialize`.
      step: optimizer steps taken.
      batches: those of the next steps, after `compile`.
      interrupt, writer, profiler, watchdog, progress: within `running`.
      prober: after `compile`; None without `train.probe_every_steps`.
    """

    def __init__(
        self,
        config: Config,
        workdir: str,
        mesh: Mesh,
        sources: Sources,
        train_source: pipeline.Source,
        eval_sources: Mapping[str, Mapping[str, pipeline.Source]],
        checkpointer: Any,
        stopwatch: Stopwatch,
    ):
        """Describes the model and its optimizer; allocates nothing.

        Args:
          train_source: batches of the training split.
          eval_sources: by split, and within a split by the name of the set.
          checkpointer: a `Checkpointer`, or to evaluate only, `SealedSteps`.
          stopwatch: counts what the run spends its time on.
        """
        self.config, self.workdir, self.mesh, self.sources = config, workdir, mesh, sources
        self.train_source, self.eval_sources = train_source, eval_sources
        self.stopwatch = stopwatch
        self.total_steps = config.train.total_steps
        self._loading = {"threads": config.data.threads, "prefetch": config.data.prefetch}
        self.model = self._build()
        self.optimizer = make_optimizer(config, self.model, mesh)
        self.abstract = abstract_state(self.model, self.optimizer.tx, mesh)
        self.num_params = sum(x.size for x in jax.tree.leaves(self.abstract.params))
        self.overview = parameter_overview.get_parameter_overview(
            self.abstract.params, include_stats=False
        )
        with on_mesh(mesh):
            self.operations = models.operations(config)
        self.checkpointer = checkpointer
        self.eval_step = jit_eval_step(self.model, sources.objective, mesh, self.abstract)
        self.prober: Prober | None = None
        self.state: Any = None
        self.origin: project_files.Origin | None = None  # of its parameters, if read from a run
        self.step = 0
        self._validated: tuple[int, dict[str, Any]] = (-1, {})  # the last step that was
        self._num_rollbacks: dict[int, int] = collections.Counter()  # by the step restored

    # ---- before the first step

    def restore(self) -> bool:
        """Restores the newest sound checkpoint; returns whether there is one."""
        self.state = self.checkpointer.restore(self.abstract)
        if self.state is not None:
            self.step = int(self.state.step)
        return self.state is not None

    def initialize(self) -> None:
        """Initializes the state of step 0: at random, or from another run's parameters."""
        config, tx = self.config, self.optimizer.tx
        if config.train.start_from:
            params, self.origin = start_from.parameters(config, self.abstract.params)
            with on_mesh(self.mesh):
                self.state = state_of(params, tx, self.abstract)
        else:
            self.state = init_state(self.model, tx, self.mesh, config.seed)
        if config.train.start_from or config.train.on_bad_step == "rollback":
            self.checkpointer.save(0, self.state, None)  # so that there is a step to go back to

    def report_start(self) -> None:
        """Prints the model, the first step, and what changed since the last start of this run."""
        logging.info("Parameters:\n%s", self.overview)
        operations = (f"\n{name} by {choice}" for name, choice in self.operations.items())
        runtime.print_once(
            f"{self.config.model.name}: {self.num_params:,} parameters, starting at step "
            f"{self.step}" + "".join(operations)
        )
        if self.origin is not None:
            runtime.print_once(start_from.report(self.origin))
        for change in starts.record_start(
            self.workdir, self.mesh, self.step, self.operations, self.origin
        ):
            runtime.print_once(change)

    @contextlib.contextmanager
    def running(self, check_lease: Callable[[], None]) -> Iterator[None]:
        """The context of all steps: sets the mesh, handles signals, opens and closes writers.

        Args:
          check_lease: raises if another run has taken the workdir.
        """
        config, workdir, self.check_lease = self.config, self.workdir, check_lease
        with (
            on_mesh(self.mesh),
            runtime.Interrupt() as self.interrupt,
            self.checkpointer,
            MetricWriter(
                workdir,
                is_leader=runtime.is_leader(),
                resume_step=self.step,
                descriptions=self.sources.objective.descriptions,
                wandb_project=config.train.wandb_project,
                run_config=config_lib.to_dict(config),
            ) as self.writer,
            contextlib.closing(
                Profiler(workdir, config.train.profile_steps, runtime.this_process())
            ) as self.profiler,
            Watchdog(
                workdir,
                factor=config.train.stall_factor,
                seconds=config.train.stall_seconds,
                report=self.report_stall,
            ) as self.watchdog,  # after the writer, as it may report a stall at once
            runtime.exit_on_peer_loss(),
        ):
            if self.step == 0:
                texts = {"config": str(config), "parameters": self.overview}
                self.writer.texts(0, {name: f"```\n{text}\n```" for name, text in texts.items()})
            with self.stopwatch.time("setup"):
                self.progress = Progress(
                    config, workdir, self.mesh, self.abstract, self.sources, self.writer,
                    self.step, self.checkpointer.window(self.step), self.stopwatch,
                    starts.has_ended(workdir, self.step),
                )  # fmt: skip
            yield

    def compile(self) -> None:
        """Compiles the training step, once all processes are known to have the same program."""
        config, sources, mesh = self.config, self.sources, self.mesh
        rows, row_len = config.train.global_batch_size, config_lib.row_len(config)
        batch = abstract_batch(rows, row_len, mesh, by_position=sources.objective.by_position)
        if config.train.probe_every_steps:
            self.prober = Prober(
                self.workdir, self.model, self.optimizer, sources.objective, config, mesh,
                self.abstract, self.step,
            )  # fmt: skip
        with self.stopwatch.time("compile"):
            lowered = jit_train_step(
                self.model, self.optimizer, sources.objective, config, mesh, self.abstract
            ).lower(self.abstract, batch)
            program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
            runtime.compare("program and data", {"program": program, "data": sources.digest})
            self._compiled_step = lowered.compile()
        self.batches = self._batches_from(self.step)

    # ---- steps

    def train(self) -> None:
        """Runs the remaining steps, with validation and checkpoints when they are due.

        Raises:
          Preempted: SIGTERM came, to this or to another process, or the run's time is up.
          NonFiniteError: a loss, a gradient or a parameter is not finite.
        """
        evals, saves = self.config.train.eval_every_steps, self.config.checkpoint.every_steps
        if self.step and self._is_due(evals) and not self.checkpointer.metrics(self.step):
            # The run was preempted before this step was validated.
            self.checkpointer.add_metrics(self.step, self.validate())
        self.progress.restart_timers(self.step)
        while self.step < self.total_steps:
            self.check_for_shutdown()
            try:
                self.train_step()
                if self._is_due(evals) or self._is_due(saves):
                    self.progress.flush_pending()  # only a step known to be sound is saved
                    self.progress.reset_host_timer()
            except BadStepError as bad:
                self.roll_back(bad)
            scores = self.validate() if self._is_due(evals) else None
            if self._is_due(saves):
                self.save(scores)

    def train_step(self) -> None:
        """Dispatches the next step, and reads the metrics of the step before."""
        with self.stopwatch.time("data"):
            batch = next(self.batches)
        if self.prober and self.step % self.config.train.probe_every_steps == 0:
            self.probe(self.prober, batch)
        self.checkpointer.check()  # a save that failed in the background ends the run now
        with self.profiler.step(self.step + 1), self.progress.time_step():
            self.state, metrics = self._compiled_step(self.state, batch)
            self.step += 1
            self.progress.add(self.step, metrics)
        runtime.preemption.has_unsaved_steps = True

    def probe(self, prober: Prober, batch: Any) -> None:
        """Writes what the layers show of themselves before the next step, which takes `batch`."""
        self.progress.flush_pending()  # only a state known to be sound is probed
        with self.stopwatch.time("probe"):
            self.writer.scalars(self.step, prober.probe(self.step, self.state, batch))
        self.progress.reset_host_timer()

    def validate(self) -> dict[str, float]:
        """Evaluates and reports the validation split; returns the scores for the checkpoint."""
        validation = self.evaluate("validation")
        self._validated = self.step, validation
        self.report_evaluation("validation", validation)
        if self.sources.objective.is_language_model and self.config.train.sample_bytes:
            with self.stopwatch.time("sample"):
                self.writer.texts(self.step, {"sample": self.sample()})
        if self.prober and runtime.is_leader():
            with self.stopwatch.time("probe"):
                self.writer.images(self.step, self.prober.pictures())
        return self.sources.objective.scores(validation)

    @property
    def validation(self) -> dict[str, Any] | None:
        """The metrics of the validation split at this step, if it has been evaluated."""
        step, validation = self._validated
        return validation if step == self.step else None

    def report_evaluation(self, split: str, evaluation: Mapping[str, Any]) -> None:
        """Prints and writes an evaluation, with its first examples where they are pictures."""
        self.progress.report_eval(split, self.step, evaluation)
        predicted = evaluation.get("first_predictions")
        if predicted is None or not runtime.is_leader():
            return
        with self.stopwatch.time("eval"):
            source, task = next(iter(self.eval_sources[split].values())), self.sources.task
            predicted = predicted[: min(source.num_records, source.batch_size)]
            batch = source.rows(0, np.arange(len(predicted)))
            records = (row[row != PAD].astype(np.uint8) for row in batch["tokens"])
            pictures = [x for row in records if (x := task.picture(row)) is not None]
            of_one_shape = len({x.shape for x in pictures}) == 1
            if len(pictures) == len(predicted) and of_one_shape:
                drawn = examples.sheet(pictures, batch["labels"], predicted, self.sources.classes)
                self.writer.images(self.step, {f"{split}/examples": drawn})

    def evaluate(self, split: str) -> dict[str, Any]:
        """As `evaluate_only`, within `running`: is timed, and checks for a shutdown."""
        with self.stopwatch.time("eval"):
            return self.evaluate_only(split, self.check_for_shutdown)

    def evaluate_only(
        self, split: str, before_batch: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """The metrics of the current parameters on a split; see `evaluate.evaluate`."""
        sources, params = self.eval_sources[split], evaluated(self.state)
        return evaluate(
            self.eval_step, params, sources, self.mesh, before_batch=before_batch, **self._loading
        )

    def sample(self) -> str:
        """A continuation of `train.sample_prompt` by the current parameters, in Markdown."""
        config, sources = self.config, self.sources
        trained = Trained(
            config=config,
            mesh=self.mesh,
            module=self._build(decoding=True),
            params=unstack(evaluated(self.state)),
            step=self.step,
            num_classes=sources.num_classes,
            vocab_size=sources.vocab_size,
            data_digest=sources.digest,
            classes=sources.classes,
        )
        prompt, num_bytes = config.train.sample_prompt.encode(), config.train.sample_bytes
        pieces = continuations(trained, [prompt], num_bytes=num_bytes, seed=config.seed)
        text = prompt + b"".join(piece for (piece,) in pieces)
        return "```\n" + text.decode(errors="replace") + "\n```"

    def save(self, scores: Mapping[str, float] | None) -> None:
        """Starts to save the state, once the metrics up to this step are stored."""
        with self.stopwatch.time("checkpoint"):
            self.writer.flush()
            window = self.progress.window()
            self.checkpointer.save(self.step, self.state, scores, window=window)

    def roll_back(self, bad: BadStepError) -> None:
        """Restores the newest checkpoint and continues after the bad step, whose batch is skipped.

        Raises:
          NonFiniteError: `train.max_bad_steps` rollbacks to this checkpoint were made before.
        """
        state: Any = self.checkpointer.restore(self.abstract)
        newest, limit = int(state.step), self.config.train.max_bad_steps
        self._num_rollbacks[newest] += 1
        if self._num_rollbacks[newest] > limit:
            raise NonFiniteError(
                f"{bad}; step {newest} has been restored {limit} times, as "
                "often as config.train.max_bad_steps allows. Its checkpoint is kept"
            )
        self.progress.restart(bad.step)
        self.writer.scalars(bad.step, {"rollback_to": newest})
        runtime.print_once(f"{bad}; continuing behind it with the state of step {newest}")
        self.state = state.replace(step=state.step + np.int32(bad.step - newest))
        self.step = bad.step
        self.batches = self._batches_from(self.step)

    # ---- shutdown

    def check_for_shutdown(self, *, together: bool = True) -> None:
        """Raises if the run is to end here; called between any two steps or batches.

        Args:
          together: see `Preemption.reached`.
        """
        self.watchdog.beat()
        self.interrupt.check()
        self.check_lease()
        if runtime.preemption.reached(together=together):
            raise Preempted

    def save_and_exit(self) -> NoReturn:
        """Saves the state of a preempted run.

        Raises:
          Preempted: always; says why, and names the step that is saved.
        """
        saved = "the newest checkpoint"
        with contextlib.suppress(BadStepError):  # then this state is not to be saved
            self.progress.flush_pending()
            self.checkpointer.save(self.step, self.state, None, window=self.progress.window())
            saved = f"step {self.step}"
        self.writer.flush()  # after the state, which is worth more if there is no time for both
        self.checkpointer.wait_until_finished()
        runtime.barrier("saved")  # and sealed, by the leader
        error, why = runtime.preemption.why()
        raise error(f"{why}; {saved} is saved, and the same command continues from it") from None

    def report_stall(self, stacks: Mapping[str, str]) -> None:
        """Writes the stacks of all threads; the process exits after it."""
        self.writer.texts(self.step, stacks)
        self.writer.flush()

    def _build(self, *, decoding: bool = False) -> Any:
        return models.build(
            self.config,
            num_classes=self.sources.num_classes,
            vocab_size=self.sources.vocab_size,
            decoding=decoding,
        )

    def _batches_from(self, step: int) -> Iterator[Any]:
        sharding = batch_sharding(self.mesh)
        return pipeline.load(self.train_source, sharding, step, self.total_steps, **self._loading)

    def _is_due(self, every_steps: int) -> bool:
        return self.step % every_steps == 0 or self.step == self.total_steps
