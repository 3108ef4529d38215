"""Sealed checkpoints: Orbax writes and restores them, this file answers for their bytes.

Orbax keeps no checksums: a flipped byte restores as a silently wrong parameter, and an empty step
directory counts as the newest step. So once Orbax has renamed a step into place, process 0 writes
the sha256 of each of its files as a seal, and `restore` takes the newest step that matches its
seal. For a directory RUN/checkpoints:

    RUN/checkpoints/STEP/          Orbax's files
    RUN/seals/STEP.json            {"step", "metrics", "files": {name: {"bytes", "sha256"}}}
    RUN/quarantine/STEP-N/         damaged or unfinished steps, never deleted; STEP-N.txt says why

The seals lie beside the steps because on object stores Orbax takes any folder among its steps that
lacks a commit file for a dead writer's leftovers, and deletes it. Old steps are deleted here rather
than by Orbax, which does so before the new step is sealed: a process killed in between would be
left without any sound step.
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

_NONE = -1  # no step
_FAILED = -2  # a process could not say
_HASH_THREADS = 8

# Orbax has no option for how long tensorstore repeats a request: a quarter of an hour.
for _spec in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    _spec["gcs_request_retries"] = storage.context()["gcs_request_retries"]


class SealedSteps:
    """The steps that lie in a directory, and their seals. Changes nothing there, so that one may
    read what a running job writes.
    """

    def __init__(self, directory: str):
        """`directory`: a path or a gs:// URL, beside which the seals are."""
        self._remote = storage.is_remote(directory)
        self.directory = epath.Path(directory if self._remote else os.path.abspath(directory))
        self._seals = self.directory.parent / "seals"

    @property
    def latest_sound_step(self) -> int | None:
        """The newest step with a seal; to restore is what compares the bytes."""
        return max(self._sealed_steps(), default=None)

    def metrics(self, step: int) -> dict[str, float] | None:
        """What a sealed step was saved with, or has been given since."""
        return self._read_seal(step).get("metrics")

    def choose(self, step: int | None = None) -> int:
        """The newest sealed step whose bytes match its seal, or `step` itself if they do.

        Raises:
          CheckpointError: there is none, or the bytes of `step` differ from its seal.
        """
        sealed = sorted(self._sealed_steps(), reverse=True)
        if step is not None and step not in sealed:
            there = ", ".join(map(str, sealed)) or "none"
            raise CheckpointError(
                f"{self.directory} has no sealed checkpoint of step {step}; there are: {there}"
            )
        for candidate in sealed if step is None else [step]:
            faults = self._faults(candidate)
            if not faults:
                return candidate
            told = f"checkpoint step {candidate} is not sound: {'; '.join(faults)}"
            if step is not None:
                raise CheckpointError(f"{told}; take another step of {self.directory}")
            logging.error("%s; the one before is tried", told)
        raise CheckpointError(f"{self.directory} holds no sound checkpoint; train first")

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a step's arrays by their '/'-joined names."""
        return {
            name: tuple(leaf.shape) for name, leaf in _named_leaves(self._metadata(step)).items()
        }

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters of a step that `choose` gave, without the rest of its state.

        Args:
          abstract_params: as the `abstract_state` of `Checkpointer.restore`, parameters only.

        Raises:
          CheckpointError: they are of another model; says how.
        """
        wanted = {"params": abstract_params}
        held = {name: x for name, x in described(self._metadata(step)).items() if _is_param(name)}
        check_same_model(self.directory / str(step), held, described(wanted))
        args = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        return ocp.PyTreeCheckpointHandler().restore(self._item(step), args=args)["params"]

    def _metadata(self, step: int) -> Any:
        return ocp.PyTreeCheckpointHandler().metadata(self._item(step)).tree

    def _item(self, step: int) -> Any:
        return self.directory / str(step) / "default"  # as the CheckpointManager names it

    def _faults(self, step: int) -> list[str]:
        """How the files of a step differ from its seal; empty for a sound step."""
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
        """The steps that have a seal. Asks no more of storage than to read objects."""
        if not self._seals.exists():
            return set()
        steps = {int(path.stem) for path in self._seals.iterdir() if path.suffix == ".json"}
        return {step for step in steps if (self.directory / str(step)).exists()}

    def _seal_path(self, step: int) -> Any:
        return self._seals / f"{step}.json"

    def _read_seal(self, step: int) -> dict[str, Any]:
        """The seal of a step; empty where it is damaged."""
        try:
            return dict(json.loads(self._seal_path(step).read_text()))
        except (ValueError, TypeError):
            return {}


class _Manager(ocp.CheckpointManager):
    """Asks nothing of JAX's preemption service: the loop does, and answers go to one who counts."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer(SealedSteps):
    """Saves and restores a training state: any pytree of `jax.Array`s, sharded in any way.

    All processes make the same calls in the same order. One save runs at a time, in the background;
    its failure is raised as a `CheckpointError` by the next `save`, `restore`, `check`,
    `wait_until_finished` or `close`. As a context manager it closes itself. One job at a time may
    have a directory open, as opening it clears away what looks like a dead job's unfinished save.
    """

    def __init__(
        self, directory: str, *, keep_latest: int, keep_best: int, best_metric: str = "accuracy"
    ):
        """Opens a directory and removes what a killed writer left half-written there.

        Args:
          directory: a path or a gs:// URL, made if missing. Its parent receives `seals` and
            `quarantine`, and so must belong to this run alone.
          keep_latest: how many of the newest steps to keep, at least 1.
          keep_best: how many steps with the largest `best_metric` to keep besides.
          best_metric: a key of the metrics given to `save`.

        Raises:
          CheckpointError: keep_latest is 0, or the directory cannot be made.
        """
        if keep_latest < 1:
            raise CheckpointError(f"keep_latest is {keep_latest}; at least one step must be kept")
        super().__init__(directory)
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._best_metric = best_metric
        self._quarantined = self.directory.parent / "quarantine"
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
        """Waits for the save before, then starts to save `state` as `step`.

        Returns when the arrays are on the host; they may then be donated. (On CPUs they are there
        without a copy, and JAX gives the step that would overwrite them other memory.) A step that
        is already sealed is left as it is.

        Raises:
          CheckpointError: the save before failed, or `metrics` lack the metric that ranks steps.
        """
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            if self._keep_best and self._best_metric not in metrics:
                raise CheckpointError(
                    f"steps are ranked by {self._best_metric!r}, but step {step} has only the "
                    f"metrics {sorted(metrics)}; rank by one of these or set keep_best to 0"
                )
        if self._agree(lambda: self._make_way(step)) == step:
            logging.info("checkpoint step %d is already sealed; not saved again", step)
            return
        if step in self._manager.all_steps():  # Orbax remembers a step that was moved away
            self._manager.reload()
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except storage.failures() as error:
            raise self._failure(step, error) from error
        self._background = step, self._worker.submit(self._finish, step, metrics)

    def restore(self, abstract_state: Any) -> Any | None:
        """The newest sound step, or None where there is none.

        Newer steps that have no seal or differ from it are moved to the quarantine and logged.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto; any
            mesh will do.

        Raises:
          CheckpointError: the step is sound, but of another model: lists every parameter that is
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
        """Gives a sealed step the metrics that it was saved without."""
        if jax.process_index() == 0:
            seal = self._read_seal(step) | {"metrics": dict(metrics)}
            storage.write_whole(self._seal_path(step), json.dumps(seal, indent=1))

    def check(self) -> None:
        """Raises the failure of a background save that has ended; never waits. Call it often."""
        if self._background is not None and self._background[1].done():
            self.wait_until_finished()

    def wait_until_finished(self) -> None:
        """Waits until the last save is written and sealed; raises its failure, once."""
        if self._background is None:
            return
        (step, finished), self._background = self._background, None
        error = finished.exception()
        if error is not None:
            # Orbax raises a failure once in every thread: take this thread's, so that the next
            # save starts clean.
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()
            raise self._failure(step, error) from error

    def close(self) -> None:
        """Waits for the last save and closes; raises the failure of that save."""
        try:
            self.wait_until_finished()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            logging.error("%s", error)  # must not hide the error that ends the block

    def _agree(self, decide: Callable[[], int]) -> int:
        """Process 0's decision, on all processes; a failure of any of them is raised by all.

        One that raised alone would leave the others waiting in the next collective.
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
        """The steps that Orbax takes for complete."""
        found = ocp.path.step.standard_name_format().find_all(self.directory)
        return {step.step for step in found}

    def _make_way(self, step: int) -> int:
        """`step` if it is sealed; else leaves nothing in its place."""
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
        """In the background: seals the step once Orbax has renamed it into place."""
        # Not Orbax's post_finalization_callback: that one runs before the rename, and Orbax still
        # writes to two files in between.
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            seal = {"step": step, "metrics": metrics, "files": _digests(self.directory / str(step))}
            self._seals.mkdir(parents=True, exist_ok=True)
            storage.write_whole(self._seal_path(step), json.dumps(seal, indent=1))
            self._delete_old()

    def _delete_old(self) -> None:
        """Deletes what is neither new nor good: first a step, then its seal, so none is missed."""
        scores = {}
        for step in sorted(self._sealed_steps(), reverse=True):
            metrics = self._read_seal(step).get("metrics") or {}
            scores[step] = metrics.get(self._best_metric, math.nan)
        rated = [step for step in scores if not math.isnan(scores[step])]
        best = sorted(rated, key=scores.__getitem__, reverse=True)  # of equals, the newest first
        keep = {*list(scores)[: self._keep_latest], *best[: self._keep_best]}
        for step in scores.keys() - keep:
            (self.directory / str(step)).rmtree()
        kept_seals = {f"{step}.json" for step in keep}
        for path in list(self._seals.iterdir()):
            if path.name not in kept_seals:
                path.unlink()

    def _quarantine(self, step: int, faults: list[str]) -> None:
        n = 0
        while (target := self._quarantined / f"{step}-{n}").exists():
            n += 1
        self._quarantined.mkdir(parents=True, exist_ok=True)
        # First the reasons: an object store has no folder to move into until a file is there.
        (self._quarantined / f"{step}-{n}.txt").write_text("\n".join(faults) + "\n")
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
            told = "No sound step exists yet" if kept is None else f"Step {kept} is sound and kept"
        except storage.failures():
            told = "What was sealed before is kept"
        return CheckpointError(
            f"saving step {step} in {self.directory} failed (free space there: {free}). {told}. "
            f"Cure the cause and start again: {error}"
        )


def _digests(directory: Any) -> dict[str, dict[str, Any]]:
    """Size (bytes) and sha256 of every file below, by its name relative to the directory."""
    files: list[Any] = []
    pending = [directory]
    while pending:
        for path in pending.pop().iterdir():
            (pending if path.is_dir() else files).append(path)

    def digest(path: Any) -> dict[str, Any]:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # reads in chunks
            return {"bytes": file.tell(), "sha256": sha256}

    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashing releases the interpreter's lock
        digests = pool.map(digest, files)
        return {str(path.relative_to(directory)): d for path, d in zip(files, digests, strict=True)}


def check_same_model(path: Any, held: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Compares what is `described` of a checkpoint and of a model.

    Orbax would convert another dtype without a word.

    Raises:
      CheckpointError: lists every array that is missing, unknown, or of another shape or dtype.
    """
    differences = [
        f"  {name}: checkpoint {held.get(name, 'absent')}, model {wanted.get(name, 'absent')}"
        for name in sorted(held.keys() | wanted.keys())
        if held.get(name) != wanted.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint {path} is of another model; restore it with the configuration that wrote "
            "it, or choose another workdir:\n" + "\n".join(differences)
        )


def _is_param(name: str) -> bool:
    return name.startswith("params/")


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Every array of a state, or what Orbax knows of one, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def described(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array of a tree, by its path."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in _named_leaves(tree).items()}
