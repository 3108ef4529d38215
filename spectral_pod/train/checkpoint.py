"""Checkpoints with checksums: Orbax writes and restores them, this module verifies their bytes.

Orbax stores no checksums: a flipped byte is restored as a silently wrong parameter, and an empty
step directory counts as the newest step. So once Orbax has renamed a step into place, process 0
writes the sha256 of each of its files as the step's seal. A step is sound if its files match its
seal, and `restore` takes the newest sound step. For a directory RUN/checkpoints:

    RUN/checkpoints/STEP/          Orbax's files
    RUN/seals/STEP.json            {"step", "metrics", "files": {name: {"bytes", "sha256"}}}
    RUN/quarantine/STEP-N/         damaged or unfinished steps, never deleted; STEP-N.txt says why

The seals are outside of Orbax's directory because on object stores Orbax deletes any folder there
that lacks a commit file, as the remains of a dead writer. Old steps are deleted here and not by
Orbax, which does so before the new step is sealed: a process killed in between would leave no sound
step.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from spectral_pod import storage
from spectral_pod.errors import CheckpointError

_NONE = -1  # there is no step
_FAILED = -2  # a process failed to decide
_HASH_THREADS = 8

# Orbax has no option for tensorstore's retries, which by default last for a quarter of an hour.
for _spec in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    _spec["gcs_request_retries"] = storage.context()["gcs_request_retries"]


class SealedSteps:
    """The steps in a directory and their seals, read-only: safe while a job writes there."""

    def __init__(self, directory: str):
        """Opens a directory, a path or a gs:// URL, with the folder `seals` next to it."""
        self._remote = storage.is_remote(directory)
        self.directory = epath.Path(directory if self._remote else os.path.abspath(directory))
        self._seals = self.directory.parent / "seals"

    @property
    def latest_sound_step(self) -> int | None:
        """The newest step with a seal; only restoring it verifies its bytes."""
        return max(self._sealed_steps(), default=None)

    def metrics(self, step: int) -> dict[str, float] | None:
        """The metrics with which a sealed step was saved, or that were added later."""
        return self._read_seal(step).get("metrics")

    def choose(self, step: int | None = None) -> int:
        """The newest sound step, or `step` itself if it is sound.

        Raises:
          CheckpointError: there is no sound step, or `step` has no seal or differs from it.
        """
        sealed = sorted(self._sealed_steps(), reverse=True)
        if step is not None and step not in sealed:
            available = ", ".join(map(str, sealed)) or "none"
            raise CheckpointError(
                f"{self.directory} has no sealed checkpoint of step {step}; there are: {available}"
            )
        for candidate in sealed if step is None else [step]:
            faults = self._faults(candidate)
            if not faults:
                return candidate
            message = f"checkpoint step {candidate} is not sound: {'; '.join(faults)}"
            if step is not None:
                raise CheckpointError(f"{message}; take another step of {self.directory}")
            logging.error("%s; the one before is tried", message)
        raise CheckpointError(f"{self.directory} holds no sound checkpoint; train first")

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a step's arrays by name, with '/' between the parts of a name."""
        return {
            name: tuple(leaf.shape) for name, leaf in _named_leaves(self._metadata(step)).items()
        }

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Restores the parameters alone of a step returned by `choose`.

        Args:
          step: the step.
          abstract_params: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto.

        Raises:
          CheckpointError: the parameters are another model's; the message lists the differences.
        """
        expected = {"params": abstract_params}
        found = {name: x for name, x in described(self._metadata(step)).items() if _is_param(name)}
        check_same_model(self.directory / str(step), found, described(expected))
        args = ocp.args.PyTreeRestore(
            item=expected,
            restore_args=ocp.checkpoint_utils.construct_restore_args(expected),
            partial_restore=True,
        )
        return ocp.PyTreeCheckpointHandler().restore(self._item(step), args=args)["params"]

    def _metadata(self, step: int) -> Any:
        return ocp.PyTreeCheckpointHandler().metadata(self._item(step)).tree

    def _item(self, step: int) -> Any:
        return self.directory / str(step) / "default"  # the name given by the CheckpointManager

    def _faults(self, step: int) -> list[str]:
        """How the files of a step differ from its seal; empty if the step is sound."""
        if not self._seal_path(step).exists():
            return ["it has no seal: its writer was stopped before the step was complete"]
        sealed = self._read_seal(step).get("files")
        if not isinstance(sealed, dict):
            return [f"its seal {self._seal_path(step)} is damaged"]
        present = _digests(self.directory / str(step))
        missing = [f"{name} is missing" for name in sealed.keys() - present.keys()]
        added = [f"{name} was added" for name in present.keys() - sealed.keys()]
        common = sealed.keys() & present.keys()
        altered = [f"{name} is altered" for name in common if sealed[name] != present[name]]
        return sorted(missing + added + altered)

    def _sealed_steps(self) -> set[int]:
        """The steps that have a seal. Needs no permission but to read objects."""
        if not self._seals.exists():
            return set()
        steps = {int(path.stem) for path in self._seals.iterdir() if path.suffix == ".json"}
        return {step for step in steps if (self.directory / str(step)).exists()}

    def _seal_path(self, step: int) -> Any:
        return self._seals / f"{step}.json"

    def _read_seal(self, step: int) -> dict[str, Any]:
        """The seal of a step; empty if it is damaged."""
        try:
            return dict(json.loads(self._seal_path(step).read_text()))
        except (ValueError, TypeError):
            return {}


class _Manager(ocp.CheckpointManager):
    """A manager that ignores JAX's preemption service, which the training loop itself queries."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer(SealedSteps):
    """Saves and restores a training state: any pytree of `jax.Array`s with any shardings.

    All processes must make the same calls in the same order. One save at a time runs in the
    background; its failure is raised as a `CheckpointError` by the next `save`, `restore`, `check`,
    `wait_until_finished` or `close`. A context manager, closed on exit. Only one job at a time may
    open a directory, as opening it deletes what appear to be unfinished saves of a dead job.
    """

    def __init__(
        self, directory: str, *, keep_latest: int, keep_best: int, best_metric: str = "accuracy"
    ):
        """Opens a directory and deletes unfinished saves of killed processes.

        Args:
          directory: a path or a gs:// URL, created if missing. `seals` and `quarantine` are created
            in its parent, which must therefore belong to this run alone.
          keep_latest: number of newest steps to keep, at least 1.
          keep_best: number of steps with the largest `best_metric` to keep in addition.
          best_metric: a key of the metrics passed to `save`.

        Raises:
          CheckpointError: keep_latest is 0, or the directory cannot be created.
        """
        if keep_latest < 1:
            raise CheckpointError(f"keep_latest is {keep_latest}; at least one step must be kept")
        super().__init__(directory)
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._best_metric = best_metric
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

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None) -> None:
        """Waits for the previous save, then starts saving `state` as `step`.

        Returns when the arrays have been copied to the host, after which they may be donated. (On
        CPUs they are not copied, and JAX gives other memory to the step that would overwrite them.)
        A step that is already sealed is not saved again.

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
        self._background = step, self._worker.submit(self._finish, step, metrics)

    def restore(self, abstract_state: Any) -> Any | None:
        """Restores the newest sound step; None if there is none.

        Newer steps without a matching seal are moved to the quarantine and logged.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto, for
            any mesh.

        Raises:
          CheckpointError: the step is another model's; the message lists every array that is
            missing, unknown, or of another shape or dtype.
        """
        step = self._agree(self._newest_sound)
        if step == _NONE:
            return None
        check_same_model(
            self.directory / str(step),
            described(self._manager.item_metadata(step)),
            described(abstract_state),
        )
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract_state))

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds metrics to the seal of a step that was saved without them."""
        if jax.process_index() == 0:
            seal = self._read_seal(step) | {"metrics": dict(metrics)}
            storage.write_whole(self._seal_path(step), json.dumps(seal, indent=1))

    def check(self) -> None:
        """Raises the failure of a finished background save; never waits, so call it often."""
        if self._background is not None and self._background[1].done():
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
        except CheckpointError as error:
            if kind is None:
                raise
            logging.error("%s", error)  # must not replace the error that ends the block

    def _agree(self, decide: Callable[[], int]) -> int:
        """Returns process 0's decision on all processes; a failure of any process raises on all.

        If one process alone raised, the others would wait forever in the next collective.
        """
        error: Exception | None = None
        decision = 0
        try:
            self.wait_until_finished()
            if jax.process_index() == 0:
                decision = decide()
        except Exception as failure:
            error, decision = failure, _FAILED
        decisions = multihost_utils.process_allgather(np.int32(decision))
        if isinstance(error, storage.failures()):
            raise CheckpointError(f"cannot use {self.directory}: {error}") from error
        if error is not None:
            raise error
        failed = np.flatnonzero(decisions == _FAILED).tolist()
        if failed:
            raise CheckpointError(f"checkpointing failed on process {failed}; its log says why")
        return int(decisions[0])

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
        return _NONE

    def _newest_sound(self) -> int:
        for step in sorted(self._steps(), reverse=True):
            faults = self._faults(step)
            if not faults:
                return step
            self._quarantine(step, faults)
        return _NONE

    def _finish(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Runs in the background: seals the step once Orbax has renamed it into place."""
        # Orbax's post_finalization_callback would be too early: it runs before the rename, and
        # Orbax still writes two files in between.
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            seal = {"step": step, "metrics": metrics, "files": _digests(self.directory / str(step))}
            self._seals.mkdir(parents=True, exist_ok=True)
            storage.write_whole(self._seal_path(step), json.dumps(seal, indent=1))
            self._delete_old()

    def _delete_old(self) -> None:
        """Deletes steps that are neither new nor among the best: the step first, then its seal."""
        scores = {}
        for step in sorted(self._sealed_steps(), reverse=True):
            metrics = self._read_seal(step).get("metrics") or {}
            scores[step] = metrics.get(self._best_metric, math.nan)
        rated = [step for step in scores if not math.isnan(scores[step])]
        best = sorted(rated, key=scores.__getitem__, reverse=True)  # the newest first among equals
        keep = {*list(scores)[: self._keep_latest], *best[: self._keep_best]}
        for step in scores.keys() - keep:
            (self.directory / str(step)).rmtree()
        kept_seals = {f"{step}.json" for step in keep}
        for path in list(self._seals.iterdir()):
            if path.name not in kept_seals:
                path.unlink()

    def _quarantine(self, step: int, faults: list[str]) -> None:
        n = 0
        while (target := self._quarantine_dir / f"{step}-{n}").exists():
            n += 1
        self._quarantine_dir.mkdir(parents=True, exist_ok=True)
        # Write the reasons first: on object stores a folder exists only once it has a file.
        (self._quarantine_dir / f"{step}-{n}.txt").write_text("\n".join(faults) + "\n")
        (self.directory / str(step)).rename(target)
        self._seal_path(step).unlink(missing_ok=True)
        reasons = "; ".join(faults)
        logging.error("checkpoint step %d is not sound: %s; moved to %s", step, reasons, target)

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


def _digests(directory: Any) -> dict[str, dict[str, Any]]:
    """The size (bytes) and sha256 of every file below `directory`, by relative name."""
    files: list[Any] = []
    pending = [directory]
    while pending:
        for path in pending.pop().iterdir():
            (pending if path.is_dir() else files).append(path)

    def digest(path: Any) -> dict[str, Any]:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # reads in chunks
            return {"bytes": file.tell(), "sha256": sha256}

    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashing releases the GIL
        digests = pool.map(digest, files)
        return {str(path.relative_to(directory)): d for path, d in zip(files, digests, strict=True)}


def check_same_model(path: Any, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compares the arrays of a checkpoint with those of a model, both from `described`.

    Orbax itself would convert dtypes silently.

    Raises:
      CheckpointError: lists every array that is missing, unknown, or of another shape or dtype.
    """
    differences = [
        f"  {name}: checkpoint {found.get(name, 'absent')}, model {expected.get(name, 'absent')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint {path} is of another model; restore it with the configuration that wrote "
            "it, or choose another workdir:\n" + "\n".join(differences)
        )


def _is_param(name: str) -> bool:
    return name.startswith("params/")


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Every array of a state, or Orbax's metadata of it, by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def described(tree: Any) -> dict[str, str]:
    """The dtype and shape of every array of a tree as text, by path."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in _named_leaves(tree).items()}
