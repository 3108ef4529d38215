"""Export of a trained model to a folder, and import from it, exact to the bit.

DIR/model.safetensors   float32 parameters, with names such as layer_0.hyena.filter; of a filter
                        that uses some frequencies only (`train/selection.py`) these alone, and
                        their numbers, int32, as layer_0.spectral.filter.frequencies
DIR/config.json         the run's configuration and the rest of `Trained`; written last
DIR/README.md           the model card
"""

import hashlib
import html
import re
from collections.abc import Mapping
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
from spectral_pod.generate.restore import Trained, fitted, one_device, recorded_config
from spectral_pod.layers.parameter import by_frequency
from spectral_pod.models.model import abstract_params
from spectral_pod.parallel.sharding import tree_shardings
from spectral_pod.train.sealed_steps import check_same_model, described

Arrays = dict[str, np.ndarray]  # by name

_SHOWN_CLASSES = 64
_FREQUENCIES = ".frequencies"  # ends the name of what says which ones a filter has
_PARAMETERS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_CARD_TEXT = """---
{fields}
---

# {cls}, task {task}

A {cls} that reads bytes and predicts {predicts}. Trained with spectral_pod.

- {num_params:,} float32 parameters
- {model.num_layers} layers of width {model.hidden_dim}, the blocks repeating {pattern}
- trained for {step:,} steps of {rows} x {seq_len} bytes

## Data

Task `{task}`{options}; sha256 of the data `{digest}`.

## Results

{results}

## Use

```python
from spectral_pod import {cls}

model = {cls}.from_export("this folder")
{use}
```

## License

{license}
"""


def save(
    trained: Trained,
    directory: str,
    *,
    result: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> int:
    """Writes a trained model to a new or empty folder.

    Args:
      trained: the model.
      directory: the folder, on disk or gs://, created if missing.
      result: the content of the run's result.json, if the run has ended.
      license: an identifier for the card, such as 'apache-2.0'; None omits it.

    Returns:
      By how many bytes the parameters are smaller than with all frequencies of filters.

    Raises:
      DataError: the folder is not empty.
    """
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
    storage.write_whole(folder / _CARD, card(trained, result, license))
    facts = {
        "config": config_lib.to_dict(trained.config),
        "num_classes": trained.num_classes,
        "vocab_size": trained.vocab_size,
        "step": trained.step,
        "data_digest": trained.data_digest,
        "classes": trained.classes,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    project_files.EXPORT.write(folder / _CONFIG, facts)
    return _num_bytes(whole) - _num_bytes(params)


def load(directory: str, *, mesh: Mesh | None = None, dtype: str = "float32") -> Trained:
    """Loads a model written by `save`; `mesh` and `dtype` are as in `restore_for_inference`.

    Raises:
      DataError: there is no exported model in the folder.
      ConfigError: its configuration is of another version, or does not fit the mesh.
      CheckpointError: its parameters are damaged, or another model's.
    """
    directory = storage.place(directory, "directory")
    storage.check_access(directory, write=False)
    folder = epath.Path(directory)
    for name in (_CONFIG, _PARAMETERS):
        if not (folder / name).exists() or (folder / name).is_dir():
            raise DataError(f"{directory} holds no exported model: it has no file {name}")
    facts = project_files.EXPORT.read(folder / _CONFIG)
    data = (folder / _PARAMETERS).read_bytes()
    if facts["sha256"] != hashlib.sha256(data).hexdigest():
        raise CheckpointError(
            f"{folder / _PARAMETERS} is damaged: its sha256 is not the one in {_CONFIG}; get or "
            "export the model again"
        )
    if facts["classes"] and len(facts["classes"]) != facts["num_classes"]:
        raise CheckpointError(f"{folder / _CONFIG} names other classes than its model has")
    mesh = mesh or one_device()
    config = recorded_config(facts["config"], str(folder / _CONFIG))
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


def card(trained: Trained, result: Mapping[str, Any] | None, license: str | None) -> str:
    """The model card: Markdown, with the metadata that the Hugging Face Hub reads."""
    config = trained.config
    cls = models.MODELS[config.model.name].__name__  # as in spectral_pod.api
    num_params = sum(x.size for x in jax.tree.leaves(trained.params))
    fields = ["library_name: spectral_pod", "tags: [byte-level, spectral, jax]"]
    if license:
        fields.insert(0, f"license: {license}")
    if trained.objective.is_language_model:
        fields.append("pipeline_tag: text-generation")
        predicts = "the byte that follows, or the end of a document"
        use = 'print(model.generate("To be", max_length=200))'
    elif not trained.objective.by_position:
        predicts = f"one of {trained.num_classes} classes"
        names = ", ".join(map(_plain, trained.classes[:_SHOWN_CLASSES]))
        more = ", ..." if len(trained.classes) > _SHOWN_CLASSES else ""
        predicts += f": {names}{more}" if names else ""
        use = 'print(model.classes[model.classify(b"some bytes").argmax()])'
    else:
        predicts = f"one of {trained.num_classes} symbols at every position"
        use = "print(model(tokens).argmax(-1))  # int tokens [batch, length]"
    options = _plain(", ".join(f"{k}={value!r}" for k, value in config.data.options.items()))
    return _CARD_TEXT.format(
        fields="\n".join(fields),
        cls=cls,
        task=config.data.task,
        predicts=predicts,
        num_params=num_params,
        model=config.model,
        pattern=", ".join(models.pattern(config)),
        step=trained.step,
        rows=config.train.global_batch_size,
        seq_len=config.data.seq_len,
        options=f" with {options}" if options else "",
        digest=trained.data_digest,
        results="\n".join(_results(trained, result)),
        use=use,
        license=license or "None is stated.",
    )


def _results(trained: Trained, result: Mapping[str, Any] | None) -> list[str]:
    if result is None or result["step"] != trained.step:
        return ["None are recorded of this step."]
    evaluation: Mapping[str, Any] = result["eval"]
    scores = {name: x for name, x in evaluation.items() if _is_number(x)}
    return [
        f"On the {_plain(result['eval']['split'])} split:",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_plain(name.replace('_', ' '))} | {x:.6g} |" for name, x in scores.items()),
    ]


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) < 1e300


def _plain(text: str) -> str:
    """Text from data or users, so that Markdown and HTML show it as it is, on one line."""
    one_line = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", html.escape(one_line, quote=False))
