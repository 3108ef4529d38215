"""Restores a trained model for inference from the workdir of a run, onto any mesh.

For inference its layers are unstacked (`layers.block.unstack`), as decoding requires; this also
gives exported parameters plain names.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import optax
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spectral_pod import config as config_lib
from spectral_pod import fields, models, project_files, storage
from spectral_pod.config import Config
from spectral_pod.data import tasks, vocabulary
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.data.vocabulary import Vocabulary
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.layers.block import unstack
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.models.model import Model, abstract_params
from spectral_pod.objectives import Objective
from spectral_pod.parallel.mesh import AXES, make_mesh, on_mesh
from spectral_pod.parallel.sharding import tree_shardings
from spectral_pod.train.sealed_steps import SealedSteps
from spectral_pod.train.state import abstract_state, check_finite
from spectral_pod.validation import validate, validate_mesh


class Trained(NamedTuple):
    """A trained model for inference.

    Attributes:
      config: the configuration of its run.
      mesh: the mesh that holds the parameters; it must be set where the module is applied.
      module: from `models.build(..., decoding=True)`; it also maps whole sequences.
      params: float32, from `layers.block.unstack`.
      step: training steps taken.
      num_classes: C, the number of logits.
      vocab_size: rows of the embedding table.
      data_digest: digest of the training data.
      classes: the names of the classes; empty if the classes are bytes or symbols, or if the model
        has not been trained.
    """

    config: Config
    mesh: Mesh
    module: Model
    params: Any
    step: int
    num_classes: int
    vocab_size: int
    data_digest: str
    classes: list[str]

    @property
    def objective(self) -> type[Objective]:
        """The objective of its task."""
        return self._task.objective

    @property
    def vocabulary(self) -> Vocabulary:
        """What a language model predicts: bytes, unless its task has a tokenizer.

        Raises:
          DataError: the file of its tokenizer is missing, or has not as many tokens as the model.
        """
        task = self._task
        if not isinstance(task, LanguageModelling):
            return Vocabulary()
        return _checked(task, self.num_classes).vocabulary

    @property
    def _task(self) -> tasks.StoredTask | tasks.DrawnTask:
        return tasks.make(self.config.data.task, self.config.data.options)


def restore_for_inference(
    workdir: str,
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
) -> Trained:
    """Restores the model of a run from its configuration and parameters; writes nothing there.

    To be called in a single process, however many processes trained the model.

    Args:
      workdir: a folder or a gs:// URL. The run may still be training, on any mesh.
      step: the step of a checkpoint; None for the newest sound one.
      mesh: the mesh for the parameters; None for the first device only.
      dtype: dtype of activations and products, in place of the run's.

    Raises:
      DataError: there is no run in the workdir, or the file of its tokenizer is missing or
        another one.
      ConfigError: its configuration is of another version, or does not fit the mesh.
      CheckpointError: there is no such sound checkpoint, or it is another model's.
    """
    workdir = storage.place(workdir, "workdir")
    storage.check_access(workdir, write=False)
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise DataError(f"{workdir} is no workdir of a run: it has no config.json")
    recorded = project_files.RUN.read(file)
    run = project_files.run_id(recorded)
    config = recorded_config(recorded["config"], str(file))
    saved = SealedSteps(f"{workdir}/checkpoints", run)
    while True:
        chosen = saved.choose(step)
        try:
            return _restored(saved, chosen, recorded, config, mesh or one_device(), dtype)
        except Exception:
            if step is not None or (saved.directory / str(chosen)).exists():
                raise
            # The run is training, and has deleted this step meanwhile.


def _restored(
    saved: SealedSteps,
    step: int,
    recorded: project_files.Run,
    config: Config,
    mesh: Mesh,
    dtype: str,
) -> Trained:
    """The parameters of a sound step, and the model for them."""
    # A task knows only the maximum number of its classes; the actual one depends on the data.
    num_classes = saved.shapes(step).get("params/head/bias", (0,))[0]
    task = tasks.make(config.data.task, config.data.options)
    if isinstance(task, LanguageModelling):
        _checked(task, num_classes, recorded.get("tokenizer_sha256", ""))
    vocab_size = task.vocab_size
    build = functools.partial(
        models.build,
        fitted(config, mesh, dtype),
        num_classes=num_classes,
        vocab_size=vocab_size,
    )
    stacked = abstract_state(build(), optax.identity(), mesh).params
    module = build(decoding=True)
    shardings = tree_shardings(abstract_params(module, mesh), mesh)
    with on_mesh(mesh):
        params = saved.restore_params(step, stacked, averaged=config.optimizer.average > 0)
        check_finite(params, f"checkpoint {saved.directory / str(step)}")
        params = jax.jit(unstack, out_shardings=shardings)(params)
    return Trained(
        config,
        mesh,
        module,
        params,
        step,
        num_classes,
        vocab_size,
        recorded["data_digest"],
        recorded.get("classes", []),  # missing in older workdirs
    )


def _checked(task: LanguageModelling, num_classes: int, sha256: str = "") -> LanguageModelling:
    """The task of a language model with so many classes.

    Args:
      sha256: of its tokenizer's file when it was trained; "" where that is not recorded.

    Raises:
      DataError: its tokenizer has another number of tokens or other tokens, or its file is missing.
    """
    if not task.tokenizer:
        return task
    remedy = "put the file there that it was trained with"
    if task.num_classes != num_classes:
        raise DataError(
            f"{vocabulary.OPTION} = {task.tokenizer!r} has {task.num_classes - 1:,} tokens, and "
            f"the model has {num_classes - 1:,}; {remedy}"
        )
    if sha256 and task.vocabulary.sha256 != sha256:
        raise DataError(
            f"{vocabulary.OPTION} = {task.tokenizer!r} has the sha256 "
            f"{task.vocabulary.sha256[:12]}..., and the model's tokenizer had {sha256[:12]}...; "
            f"{remedy}"
        )
    return task


def recorded_config(values: Any, file: str) -> Config:
    """The validated configuration from the fields that a file recorded.

    Fields that are newer than the file get the values that it implies, and are logged.

    Raises:
      ConfigError: it has fields or values that this version does not support.
    """
    for name in "+".join(values["model"].get("pattern", ())).split("+"):
        if name and name not in MIXERS:
            raise ConfigError(
                f"{file}: config.model.pattern has {name!r}, and there is no such mixer in "
                "spectral_pod/layers/mixers.py; one of the run's own config file belongs there "
                "before tools can read the run"
            )
    newer = config_lib.fill(values, config_lib.defaults_of(values, file))
    if newer:
        logging.warning("%s is older than %s, and is read as it was meant", file, ", ".join(newer))
    config = cast(Config, ConfigDict(values))
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(
            f"{file} is of another version of spectral_pod; use that one ({error})"
        ) from error
    return config


def one_device() -> Mesh:
    """A mesh of the first device only."""
    return make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


def fitted(config: Config, mesh: Mesh, dtype: str) -> Config:
    """The configuration of a run, adapted to inference on a mesh in a dtype.

    Raises:
      ConfigError: the mesh cannot split the model.
    """
    fields.check(config_lib.annotations()["model.dtype"], dtype, "dtype")
    config = config_lib.copy(config)
    config.model.dtype = cast(Any, dtype)
    for axis, size in mesh.shape.items():
        setattr(config.mesh, axis, size)
    # The mesh need not be able to split the batches of training.
    config.train.grad_accumulation = 1
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    config.train.global_batch_size = config.train.eval_batch_size = rows
    validate_mesh(config, mesh.size)
    return config
