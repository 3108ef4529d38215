"""The checkpoints of a run and their seals, read-only: safe while a job writes there.

`checkpoint.py` has the layout and writes it.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from spectral_pod import project_files, storage
from spectral_pod.errors import CheckpointError, DataError

NO_STEP = -1
_FAILED = -2  # a process failed to decide
_HASH_THREADS = 8

# Orbax has no option for tensorstore's retries, which by default last for a quarter of an hour.
for _spec in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    _spec["gcs_request_retries"] = storage.context()["gcs_request_retries"]


class SealedSteps:
    """The steps in a directory that have a seal."""

    def __init__(self, directory: str, run: str = ""):
        """Opens a directory, a path or a gs:// URL, with the folder `seals` next to it.

        Args:
          run: the identity of the run, which its seals name (`project_files.run_id`); "" for any.
        """
        self._remote = storage.is_remote(directory)
        self.directory = epath.Path(directory if self._remote else os.path.abspath(directory))
        self._seals = self.directory.parent / "seals"
        self._run = run

    @property
    def latest_sound_step(self) -> int | None:
        """The newest step with a seal; only restoring it verifies its bytes."""
        return max(self._sealed_steps(), default=None)

    def metrics(self, step: int) -> dict[str, float] | None:
        """The metrics with which a sealed step was saved, or that were added later."""
        seal = self._read_seal(step)
        return seal["metrics"] if seal else None

    def window(self, step: int) -> dict[str, list[float]]:
        """The `window` with which a step was saved; empty if there is no such step."""
        seal = self._read_seal(step) if step in self._sealed_steps() else None
        return seal.get("window", {}) if seal else {}

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
        if step is None:
            newest = self._newest_sound()
            if newest == NO_STEP:
                raise CheckpointError(f"{self.directory} holds no sound checkpoint; train first")
            return newest
        if faults := self._faults(step):
            raise CheckpointError(
                f"checkpoint step {step} is not sound: {'; '.join(faults)}; take another step of "
                f"{self.directory}"
            )
        return step

    def ranked(self, metric: str) -> tuple[list[int], list[int]]:
        """The sealed steps from the newest on, and those that have a metric from the best on.

        Of equally good ones the newest is first. One whose seal is damaged is in neither list.
        """
        scores: dict[int, float] = {}
        for step in sorted(self._sealed_steps(), reverse=True):
            if seal := self._read_seal(step):
                scores[step] = (seal["metrics"] or {}).get(metric, math.nan)
        rated = [step for step in scores if not math.isnan(scores[step])]
        return list(scores), sorted(rated, key=scores.__getitem__, reverse=True)

    def restore(self, abstract_state: Any) -> Any | None:
        """Restores the newest sound step; None if there is none.

        All processes must call it.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto, for
            any mesh.

        Raises:
          CheckpointError: the step is another model's; the message lists every array that is
            missing, unknown, or of another shape or dtype. Or it holds the state of another step.
        """
        step = self._agree(self._newest_sound)
        if step == NO_STEP:
            return None
        folder = self.directory / str(step)
        try:
            check_same_model(folder, described(self._metadata(step)), described(abstract_state))
            state = self._restore(step, abstract_state)
        except Exception:
            if folder.exists() or jax.process_count() > 1:
                raise
            return self.restore(abstract_state)  # its run has deleted it meanwhile
        self._check_number(step, state)
        return state

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a step's arrays by name, with '/' between the parts of a name."""
        return {
            name: tuple(leaf.shape) for name, leaf in _named_leaves(self._metadata(step)).items()
        }

    def restore_params(self, step: int, abstract_params: Any, *, averaged: bool = False) -> Any:
        """Restores the parameters alone of a step returned by `choose`.

        Args:
          step: the step.
          abstract_params: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto.
          averaged: whether to restore their average, which the run has kept.

        Raises:
          CheckpointError: the parameters are another model's; the message lists the differences.
            Or they are of another step.
        """
        expected: dict[str, Any] = {"params": abstract_params}
        prefix = "params/"
        if averaged:
            expected, prefix = {"opt_state": {"average": abstract_params}}, "opt_state/average/"
        metadata = self._metadata(step)
        found = {name: x for name, x in described(metadata).items() if name.startswith(prefix)}
        check_same_model(self.directory / str(step), found, described(expected))
        number = {"step": np.zeros((), np.int32)} if "step" in _named_leaves(metadata) else {}
        state = self._restore(step, expected | number)
        self._check_number(step, state)
        return state["opt_state"]["average"] if averaged else state["params"]

    def newest_params(self, abstract_params: Any, *, averaged: bool = False) -> tuple[int, Any]:
        """The newest sound step, and its parameters: see `restore_params`. All processes must call
        it.

        Raises:
          CheckpointError: there is no sound step, or see `restore_params`.
        """
        step = self._agree(self.choose)
        return step, self.restore_params(step, abstract_params, averaged=averaged)

    def _check_number(self, step: int, state: Any) -> None:
        """Compares the step that a state is of, if it says that, with the name of its folder."""
        held = int(_named_leaves(state).get("step", step))
        if held != step:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} holds the state of step {held}; name it "
                "so, or move it away"
            )

    def _restore(self, step: int, abstract: Any) -> Any:
        """Restores those leaves of a step that `abstract` has."""
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return ocp.PyTreeCheckpointHandler().restore(self._item(step), args=args)

    def _metadata(self, step: int) -> Any:
        return ocp.PyTreeCheckpointHandler().metadata(self._item(step)).tree

    def _item(self, step: int) -> Any:
        return self.directory / str(step) / "default"  # the name given by the CheckpointManager

    def _faults(self, step: int) -> list[str]:
        """How the files of a step differ from its seal; empty if the step is sound."""
        if not self._seal_path(step).exists():
            return ["it has no seal: its writer was stopped before the step was complete"]
        try:
            seal = project_files.SEAL.read(self._seal_path(step))
        except DataError as error:
            return [str(error)]
        if seal["step"] != step:
            return [f"its seal is of step {seal['step']}"]
        if not self._is_ours(seal):
            return ["it is of another run: its seal names another configuration or other data"]
        try:
            present = file_digests(self.directory / str(step))
        except FileNotFoundError:
            return ["its run has deleted it meanwhile"]
        sealed = seal["files"]
        missing = [f"{name} is missing" for name in sealed.keys() - present.keys()]
        added = [f"{name} was added" for name in present.keys() - sealed.keys()]
        common = sealed.keys() & present.keys()
        altered = [f"{name} is altered" for name in common if sealed[name] != present[name]]
        return sorted(missing + added + altered)

    def _is_ours(self, seal: project_files.Seal) -> bool:
        return not self._run or seal.get("run", self._run) == self._run

    def _refuse_another_run(self) -> None:
        """Raises if there are steps, and all are of other runs: then the record is wrong."""
        seals = [seal for step in self._sealed_steps() if (seal := self._read_seal(step))]
        if seals and not any(map(self._is_ours, seals)):
            raise CheckpointError(
                f"all checkpoints in {self.directory} are of another run than "
                f"{self.directory.parent / 'config.json'} records; restore that file, or start in "
                "another --workdir"
            )

    def _newest_sound(self) -> int:
        """The newest sound step, or NO_STEP; others are logged."""
        self._refuse_another_run()
        for step in sorted(self._sealed_steps(), reverse=True):
            faults = self._faults(step)
            if not faults:
                return step
            logging.error(
                "checkpoint step %d is not sound: %s; the one before is tried",
                step,
                "; ".join(faults),
            )
        return NO_STEP

    def _agree(self, decide: Callable[[], int]) -> int:
        """Returns process 0's decision on all processes; a failure of any process raises on all.

        If one process alone raised, the others would wait forever in the next collective.
        """
        error: Exception | None = None
        decision = 0
        try:
            self._settle()
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

    def _settle(self) -> None:
        """Waits for what this process writes."""

    def _sealed_steps(self) -> set[int]:
        """The steps that have a seal. Needs no permission but to read objects."""
        if not self._seals.exists():
            return set()
        names = [path.stem for path in self._seals.iterdir() if path.suffix == ".json"]
        steps = {int(name) for name in names if name.isdecimal() and name == str(int(name))}
        return {step for step in steps if (self.directory / str(step)).is_dir()}

    def _seal_path(self, step: int) -> Any:
        return self._seals / f"{step}.json"

    def _read_seal(self, step: int) -> project_files.Seal | None:
        """The seal of a step; None if it is damaged."""
        try:
            return project_files.SEAL.read(self._seal_path(step))
        except DataError:
            return None


def file_digests(directory: Any) -> dict[str, dict[str, Any]]:
    """The size (bytes) and sha256 of every file below `directory`, by relative name."""
    files = storage.files_below(directory)

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


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Every array of a state, or Orbax's metadata of it, by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def described(tree: Any) -> dict[str, str]:
    """The dtype and shape of every array of a tree as text, by path."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in _named_leaves(tree).items()}
