"""Export of a trained model to a folder, and import from it, exact to the bit.

DIR/model.safetensors   float32 parameters, with names such as layer_0.hyena.filter; of a filter
                        that uses some frequencies only (`train/selection.py`) these alone, and
                        their numbers, int32, as layer_0.spectral.filter.frequencies
DIR/tokenizer.json      of a model of tokens: what these are, as its training read it
DIR/config.json         the run's configuration and the rest of `Trained`; written last
DIR/README.md           the model card (`model_card.py`)
"""

import hashlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from spectral_pod import config as config_lib
from spectral_pod import models, project_files, storage
from spectral_pod.errors import CheckpointError, DataError
from spectral_pod.generate.model_card import card
from spectral_pod.generate.restore import Trained, fitted, one_device, recorded_config
from spectral_pod.generate.run_records import NO_RECORDS, RunRecords
from spectral_pod.layers.parameter import by_frequency
from spectral_pod.models.model import abstract_params
from spectral_pod.parallel.sharding import tree_shardings
from spectral_pod.train.sealed_steps import check_same_model, described

Arrays = dict[str, np.ndarray]  # by name

_FREQUENCIES = ".frequencies"  # ends the name of what says which ones a filter has
_PARAMETERS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_TOKENIZER = "tokenizer.json"


def save(
    trained: Trained,
    directory: str,
    *,
    records: RunRecords = NO_RECORDS,
    license: str | None = None,
    watts: float | None = None,
) -> int:
    """Writes a trained model to a new or empty folder.

    Args:
      trained: the model.
      directory: the folder, on disk or gs://, created if missing.
      records, license, watts: what the model card says beside it; see `model_card.card`.

    Returns:
      By how many bytes the parameters are smaller than with all frequencies of filters.

    Raises:
      DataError: the folder is not empty, or the model's tokenizer is missing.
    """
    vocabulary = trained.vocabulary
    directory = storage.place(directory, "directory")
    folder = epath.Path(directory)
    refuse_if_used(directory)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        name: np.asarray(x, order="C")
        for name, x in traverse_util.flatten_dict(trained.params, sep=".").items()
    }
    params = _smaller(whole, abstract_params(trained.module, trained.mesh))
    data = safetensors.numpy.save(params)  # `save_file` would make it readable by its owner only
    storage.write_whole(folder / _PARAMETERS, data)
    storage.write_whole(folder / _CARD, card(trained, records, license, watts))
    facts: dict[str, Any] = {
        "config": config_lib.to_dict(trained.config),
        "num_classes": trained.num_classes,
        "vocab_size": trained.vocab_size,
        "step": trained.step,
        "data_digest": trained.data_digest,
        "classes": trained.classes,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    if vocabulary.content:
        storage.write_whole(folder / _TOKENIZER, vocabulary.content)
        facts["tokenizer_sha256"] = vocabulary.sha256
    project_files.EXPORT.write(folder / _CONFIG, facts)
    return _num_bytes(whole) - _num_bytes(params)


def load(directory: str, *, mesh: Mesh | None = None, dtype: str = "float32") -> Trained:
    """Loads a model written by `save`; `mesh` and `dtype` are as in `restore_for_inference`.

    Raises:
      DataError: there is no exported model in the folder.
      ConfigError: its configuration is of another version, or does not fit the mesh.
      CheckpointError: its parameters or its tokenizer are damaged, or another model's.
    """
    directory = storage.place(directory, "directory")
    storage.check_access(directory, write=False)
    folder = epath.Path(directory)
    facts = project_files.EXPORT.read(_existing(folder / _CONFIG))
    data = _sound(folder / _PARAMETERS, facts["sha256"])
    if facts["classes"] and len(facts["classes"]) != facts["num_classes"]:
        raise CheckpointError(f"{folder / _CONFIG} names other classes than its model has")
    recorded: Any = facts["config"]
    if "tokenizer_sha256" in facts:
        _sound(folder / _TOKENIZER, facts["tokenizer_sha256"])
        recorded["data"]["options"]["tokenizer"] = str(folder / _TOKENIZER)
    mesh = mesh or one_device()
    config = recorded_config(recorded, str(folder / _CONFIG))
    module = models.build(
        fitted(config, mesh, dtype),
        num_classes=facts["num_classes"],
        vocab_size=facts["vocab_size"],
        decoding=True,
    )
    try:
        arrays = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder / _PARAMETERS} is damaged: {error}") from error
    boxed = abstract_params(module, mesh)
    whole = _whole(arrays, boxed, str(folder / _PARAMETERS))
    params = traverse_util.unflatten_dict(whole, sep=".")
    check_same_model(folder, described(params), described(nn.unbox(boxed)))
    return Trained(
        config,
        mesh,
        module,
        jax.device_put(params, tree_shardings(boxed, mesh)),
        facts["step"],
        facts["num_classes"],
        facts["vocab_size"],
        facts["data_digest"],
        facts["classes"],
    )


def _existing(file: epath.Path) -> epath.Path:
    """The file of an export, which must be there."""
    if not file.exists() or file.is_dir():
        raise DataError(f"{file.parent} holds no exported model: it has no file {file.name}")
    return file


def _sound(file: epath.Path, sha256: str) -> bytes:
    """The content of a file of an export, which must have this sha256."""
    data = _existing(file).read_bytes()
    if sha256 != hashlib.sha256(data).hexdigest():
        raise CheckpointError(
            f"{file} is damaged: its sha256 is not the one in {_CONFIG}; get or export the model "
            "again"
        )
    return data


def _filters(boxed: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """The filters of a model by name: their shapes, and the axis of frequencies."""
    found, flat = {}, traverse_util.flatten_dict(nn.unbox(boxed))
    for path, others in by_frequency(boxed).items():
        shape = flat[path].shape
        (axis,) = set(range(len(shape))) - set(others)
        found[".".join(path)] = shape, axis
    return found


def _smaller(whole: Arrays, boxed: Any) -> Arrays:
    """Parameters without the frequencies of filters at which there are zeros only."""
    params = dict(whole)
    for name, (shape, axis) in _filters(boxed).items():
        filter_F = np.moveaxis(whole[name], axis, 0).reshape(shape[axis], -1)
        # A zero with a sign would be another one after `_whole`.
        used_K = np.flatnonzero(np.any((filter_F != 0) | np.signbit(filter_F), axis=1))
        if len(used_K) < shape[axis]:
            params[name] = np.asarray(np.take(whole[name], used_K, axis), order="C")
            params[name + _FREQUENCIES] = used_K.astype(np.int32)
    return params


def _whole(params: Arrays, boxed: Any, file: str) -> Arrays:
    """Undoes `_smaller`.

    Raises:
      CheckpointError: a filter's frequencies are not those of a filter of the model.
    """
    filters, whole = _filters(boxed), dict(params)
    for numbers in (name for name in params if name.endswith(_FREQUENCIES)):
        name, used_K = numbers.removesuffix(_FREQUENCIES), whole.pop(numbers)
        shape, axis = filters.get(name, ((0,), 0))
        smaller = (*shape[:axis], used_K.size, *shape[axis + 1 :])
        some = params.get(name, np.zeros(0))
        if (
            name not in filters
            or (some.shape, some.dtype, used_K.ndim) != (smaller, np.float32, 1)
            or used_K.dtype != np.int32
            or (np.diff(used_K, prepend=-1, append=shape[axis]) < 1).any()
        ):
            raise CheckpointError(
                f"{file} is of another model: {numbers} {list(used_K.shape)} does not number "
                f"frequencies of {name} {list(some.shape)}; get or export the model again"
            )
        whole[name] = np.zeros(shape, np.float32)
        whole[name][(slice(None),) * axis + (used_K,)] = some
    return whole


def _num_bytes(params: Arrays) -> int:
    return sum(x.nbytes for x in params.values())


def refuse_if_used(directory: str) -> None:
    """Raises a `DataError` if a path is anything but a new or empty folder."""
    folder = epath.Path(directory)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{directory} holds something already; give a new or an empty folder")
