"""Checkpoints with checksums: Orbax writes and restores them, this module verifies their bytes.

Orbax stores no checksums: a flipped byte is restored as a silently wrong parameter, and an empty
step directory counts as the newest step. So once Orbax has renamed a step into place, process 0
writes the sha256 of each of its files as the step's seal. A step is sound if its files match its
seal, and `restore` takes the newest sound step. For a directory RUN/checkpoints:

    RUN/checkpoints/STEP/          Orbax's files
    RUN/seals/STEP.json            its run, step, metrics, window, and each of its files' sha256
    RUN/quarantine/STEP-N/         damaged or unfinished steps, never deleted; STEP-N.txt says why

The seals are outside of Orbax's directory because on object stores Orbax deletes any folder there
that lacks a commit file, as the remains of a dead writer. Old steps are deleted here and not by
Orbax, which does so before the new step is sealed: a process killed in between would leave no sound
step.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging

from spectral_pod import project_files, storage
from spectral_pod.errors import CheckpointError, UserError
from spectral_pod.train.sealed_steps import NO_STEP, SealedSteps, file_digests


class _Manager(ocp.CheckpointManager):
    """A manager that ignores JAX's preemption service, which the training loop itself queries."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer(SealedSteps):
    """Saves and restores a training state: any pytree of `jax.Array`s with any shardings.

    All processes must make the same calls in the same order. One save at a time runs in the
    background; its failure is raised as a `CheckpointError`, or as what `check_lease` raises, by
    the next `save`, `restore`, `check`, `wait_until_finished` or `close`. A context manager, closed
    on exit. Only one job at a time may open a directory, as opening it deletes what appear to be
    unfinished saves of a dead job.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep_latest: int,
        keep_best: int,
        best_metric: str = "accuracy",
        run: str = "",
        check_lease: Callable[[], None] = lambda: None,
    ):
        """Opens a directory and deletes unfinished saves of killed processes.

        Args:
          directory: a path or a gs:// URL, created if missing. `seals` and `quarantine` are created
            in its parent, which must therefore belong to this run alone.
          run: as in `SealedSteps`.
          keep_latest: number of newest steps to keep, at least 1.
          keep_best: number of steps with the largest `best_metric` to keep in addition.
          best_metric: a key of the metrics passed to `save`.
          check_lease: raises if another process has taken over the directory; called before
            anything is sealed, moved or deleted.

        Raises:
          CheckpointError: keep_latest is 0, or the directory cannot be created.
        """
        if keep_latest < 1:
            raise CheckpointError(f"keep_latest is {keep_latest}; at least one step must be kept")
        super().__init__(directory, run)
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._best_metric = best_metric
        self._check_lease = check_lease
        self._quarantine_dir = self.directory.parent / "quarantine"
        try:
            self._manager = _Manager(
                self.directory,
                item_handlers=ocp.StandardCheckpointHandler(),
                options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
            )
        except storage.failures() as error:
            raise CheckpointError(
                f"cannot keep checkpoints in {self.directory}: {error}"
            ) from error
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._background: tuple[int, Future[None]] | None = None

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None,
        *,
        window: Mapping[str, list[float]] | None = None,
    ) -> None:
        """Waits for the previous save, then starts saving `state` as `step`.

        Returns when the arrays have been copied to the host, after which they may be donated. (On
        CPUs they are not copied, and JAX gives other memory to the step that would overwrite them.)
        A step that is already sealed is not saved again.

        Args:
          metrics: for the choice of the best steps; None if this step was not evaluated.
          window: for whoever continues from this step; see `Progress.window`.

        Raises:
          CheckpointError: the previous save failed, or `metrics` lack the metric that ranks steps.
        """
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            if self._keep_best and self._best_metric not in metrics:
                raise CheckpointError(
                    f"steps are ranked by {self._best_metric!r}, but step {step} has only the "
                    f"metrics {sorted(metrics)}; rank by one of these or set keep_best to 0"
                )
        if self._agree(lambda: self._clear_step(step)) == step:
            logging.info("checkpoint step %d is already sealed; not saved again", step)
            return
        if step in self._manager.all_steps():  # Orbax's cache may include a quarantined step
            self._manager.reload()
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except storage.failures() as error:
            raise self._failure(step, error) from error
        self._background = step, self._worker.submit(self._finish, step, metrics, window or {})

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the seal of a step that was saved without them."""
        if jax.process_index() == 0:
            seal = project_files.SEAL.read(self._seal_path(step))
            self._check_lease()
            project_files.SEAL.write(self._seal_path(step), seal | {"metrics": dict(metrics)})

    def check(self) -> None:
        """Raises the failure of a finished background save; never waits, so call it often."""
        if self._background is not None and self._background[1].done():
            self.wait_until_finished()

    def _settle(self) -> None:
        self.wait_until_finished()

    def wait_until_finished(self) -> None:
        """Waits until the last save is written and sealed; raises its failure once."""
        if self._background is None:
            return
        (step, finished), self._background = self._background, None
        error = finished.exception()
        if error is not None:
            # Orbax raises a failure once in every thread. Consume this thread's, so that it is not
            # raised by the next save.
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()
            self._check_lease()  # where it was lost, that is why, whatever failed
            raise self._failure(step, error) from error

    def close(self) -> None:
        """Waits for the last save, closes, and raises the failure of that save."""
        try:
            self.wait_until_finished()
        finally:
            self._worker.shutdown()
            try:
                self._manager.close()
            except Exception as error:  # Orbax repeats a failed save, which has been raised
                logging.warning("closing %s: %s", self.directory, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            logging.error("%s", error)  # must not replace the error that ends the block

    # Everything below runs on process 0 only, except for the worker's wait in `_finish`.

    def _steps(self) -> set[int]:
        """The steps that Orbax considers complete."""
        found = ocp.path.step.standard_name_format().find_all(self.directory)
        return {step.step for step in found}

    def _clear_step(self, step: int) -> int:
        """Returns `step` if it is sealed; otherwise moves away whatever is in its place."""
        if step in self._sealed_steps():
            return step
        if step in self._steps():
            self._quarantine(step, ["it has no seal"])
        return NO_STEP

    def _newest_sound(self) -> int:
        self._refuse_another_run()
        for step in sorted(self._steps(), reverse=True):
            faults = self._faults(step)
            if not faults:
                return step
            self._quarantine(step, faults)
        return NO_STEP

    def _finish(
        self, step: int, metrics: Mapping[str, float] | None, window: Mapping[str, list[float]]
    ) -> None:
        """Runs in the background: seals the step once Orbax has renamed it into place."""
        # Orbax's post_finalization_callback would be too early: it runs before the rename, and
        # Orbax still writes two files in between.
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            files = file_digests(self.directory / str(step))
            seal: dict[str, Any] = {"step": step, "metrics": metrics, "files": files}
            if window:
                seal["window"] = window
            if self._run:
                seal["run"] = self._run
            self._check_lease()
            self._seals.mkdir(parents=True, exist_ok=True)
            project_files.SEAL.write(self._seal_path(step), seal)
            self._delete_old()

    def _delete_old(self) -> None:
        """Deletes steps that are neither new nor among the best: the step first, then its seal."""
        newest, best = self.ranked(self._best_metric)
        for step in {*newest} - {*newest[: self._keep_latest], *best[: self._keep_best]}:
            self._check_lease()
            (self.directory / str(step)).rmtree()
            self._seal_path(step).unlink()
        for path in list(self._seals.iterdir()):  # a process was killed between the two
            if path.suffix == ".json" and not (self.directory / path.stem).exists():
                self._check_lease()
                path.unlink()

    def _quarantine(self, step: int, faults: list[str]) -> None:
        self._check_lease()
        n = 0
        while (target := self._quarantine_dir / f"{step}-{n}").exists():
            n += 1
        self._quarantine_dir.mkdir(parents=True, exist_ok=True)
        # Write the reasons first: on object stores a folder exists only once it has a file.
        reasons = self._quarantine_dir / f"{step}-{n}.txt"
        storage.write_whole(reasons, "\n".join(faults) + "\n")
        (self.directory / str(step)).rename(target)
        self._seal_path(step).unlink(missing_ok=True)
        logging.error(
            "checkpoint step %d is not sound: %s; moved to %s", step, "; ".join(faults), target
        )

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        free = (
            "unknown" if self._remote else f"{shutil.disk_usage(self.directory).free / 1e6:.1f} MB"
        )
        try:
            kept = self.latest_sound_step
            state = "No sound step exists yet" if kept is None else f"Step {kept} is sound and kept"
        except storage.failures():
            state = "What was sealed before is kept"
        return CheckpointError(
            f"saving step {step} in {self.directory} failed (free space there: {free}). {state}. "
            f"Cure the cause and start again: {error}"
        )
