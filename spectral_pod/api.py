"""The models as Python objects: `from spectral_pod import SpectralGPT, Config`.

A thin wrapper around `models` and `generate`: each class holds the Linen module that training uses
(`module`, with its layers unstacked) and its parameters (`params`), and runs them on a mesh.
"""

import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, AnyStr, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spectral_pod import config as config_lib
from spectral_pod import fields, models
from spectral_pod.analysis.analyzer import SpectralAnalyzer as SpectralAnalyzer
from spectral_pod.data import tasks
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import NonNegative, NonNegativeFloat, Positive, Probability, shown
from spectral_pod.generate import export
from spectral_pod.generate.restore import Trained, fitted, one_device, restore_for_inference
from spectral_pod.generate.sampling import Sampling
from spectral_pod.generate.text import continuations
from spectral_pod.layers.block import unstack
from spectral_pod.models import chunks
from spectral_pod.models.model import Model as Module
from spectral_pod.models.model import abstract_params, init_params
from spectral_pod.parallel import backend
from spectral_pod.parallel.mesh import AXES, on_mesh
from spectral_pod.parallel.sharding import num_shards, tree_shardings
from spectral_pod.seeds import random_key
from spectral_pod.shapes import PAD
from spectral_pod.validation import validate

backend.leave_out_absent_tpus()


def Config(**values: Any) -> Any:
    """`config.default()` with some fields changed.

    Keywords are fields of `config.model` or sections of the configuration. The value of a section
    is a mapping, and names may be dotted. These are other names of fields:

    - `harmonic_bases` of `harmonics`, `wavelet_type` and `wavelet_levels` of `wavelet.name` and
      `wavelet.levels`, and `num_heads` of the number of heads of all mixers that have any;
    - `embed_dim` without `hidden_dim` is the width of everything;
    - `vocab_size` can be 256 only, as models read bytes.

    >>> config = Config(num_layers=2, memory={"head_dim": 32}, data={"seq_len": 512})
    >>> config.model.num_layers, config.model.memory.head_dim, config.data.seq_len
    (2, 32, 512)
    >>> Config(**{"model.wavelet.levels": 4}).model.wavelet.levels
    4
    >>> Config(embed_dim=64, wavelet_levels=4).model.hidden_dim
    64

    Raises:
      ConfigError: there is no such field, or its value is of another type.
    """
    config: Any = config_lib.default()
    for name, value in _by_their_names(values):
        first = name.partition(".")[0]
        section = config if first in config and first not in config.model else config.model
        _set(section, name, value)
    return config


_NAMES = {
    "harmonic_bases": "harmonics",
    "wavelet_type": "wavelet.name",
    "wavelet_levels": "wavelet.levels",
}


def _by_their_names(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields and values, without the other names of fields."""
    for name, value in values.items():
        if name == "vocab_size":
            if value != 256:
                raise ConfigError(
                    f"Config field 'vocab_size' is {shown(value)}; models read bytes, of which "
                    "there are 256: leave it out"
                )
            continue
        if name == "num_heads":
            sections = config_lib.model_sections().items()
            yield from ((f"{section}.{name}", value) for section, x in sections if name in x)
            continue
        yield _NAMES.get(name, name), value
        if name == "embed_dim" and "hidden_dim" not in values:
            yield "hidden_dim", value


def _set(section: ConfigDict, name: str, value: Any) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"Config has no field {shown(name)}; names are text")
    name, _, rest = name.partition(".")
    if rest:
        value = {rest: value}
    free = name == "options"  # options of a task, which checks them itself
    if name not in section:
        near = difflib.get_close_matches(name, list(section), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {sorted(section)}"
        raise ConfigError(f"Config has no field {name!r}{hint}")
    if isinstance(section[name], ConfigDict) and isinstance(value, Mapping) and not free:
        for key, item in value.items():
            _set(section[name], key, item)
        return
    try:
        section[name] = ConfigDict(dict(value)) if free else value
    except (TypeError, ValueError) as error:
        held = section[name]
        kind = "a mapping" if isinstance(held, ConfigDict) else f"of type {type(held).__name__}"
        raise ConfigError(f"Config field {name!r} is {shown(value)}; it must be {kind}") from error


class Model:
    """The base of the models.

    A new model has the initial parameters of training for `config.seed`, on a mesh from
    `parallel.mesh.make_mesh`, by default on one device.

    Attributes:
      config: the configuration of the model and its training.
      module: the Linen module of `models`, with its layers unstacked.
      params: its parameters, float32.
      mesh: the mesh that holds the parameters and runs the model.
    """

    name: str  # in `models.MODELS`
    default_task: str  # for a configuration that names no task

    def __init__(self, config: ConfigDict, *, num_classes: int, mesh: Mesh | None = None):
        config = config_lib.copy(_checked_config(config))
        num_classes = _checked(Positive, num_classes, "num_classes")
        config.model.name = self.name
        config.data.task = config.data.task or self.default_task
        validate(config)
        mesh = _checked_mesh(mesh) or one_device()
        vocab_size = tasks.make(config.data.task, config.data.options).vocab_size
        build = functools.partial(
            models.build,
            fitted(config, mesh, config.model.dtype),
            num_classes=num_classes,
            vocab_size=vocab_size,
        )
        module = build(decoding=True)
        shardings = tree_shardings(abstract_params(module, mesh), mesh)

        def init(key: jax.Array) -> Any:
            return unstack(nn.unbox(init_params(build(), key, num_shards("batch"))))

        with on_mesh(mesh):
            params = jax.jit(init, out_shardings=shardings)(random_key(config.seed))
        self.use(Trained(config, mesh, module, params, 0, num_classes, vocab_size, "", []))

    def use(self, trained: Trained) -> None:
        """Takes the module, the parameters and the mesh of a model of the same class."""
        self._trained = trained
        self.config, self.mesh = trained.config, trained.mesh
        self.module, self.params = trained.module, trained.params

    @classmethod
    def from_checkpoint(
        cls,
        workdir: str,
        *,
        step: int | None = None,
        mesh: Mesh | None = None,
        dtype: str = "float32",
    ) -> Self:
        """Loads the model of a run; see `generate.restore.restore_for_inference`.

        Raises:
          UserError: there is no sound checkpoint, or the model is of another class.
        """
        step = step if step is None else _checked(NonNegative, step, "step")
        trained = restore_for_inference(workdir, step=step, mesh=_checked_mesh(mesh), dtype=dtype)
        return cls._from_trained(trained, workdir)

    @classmethod
    def from_export(
        cls, directory: str, *, mesh: Mesh | None = None, dtype: str = "float32"
    ) -> Self:
        """Loads a model from a folder written by `python -m tools.export`.

        Raises:
          UserError: there is no model, it is damaged, or it is of another class.
        """
        trained = export.load(directory, mesh=_checked_mesh(mesh), dtype=dtype)
        return cls._from_trained(trained, directory)

    @classmethod
    def _from_trained(cls, trained: Trained, origin: str) -> Self:
        name = trained.config.model.name
        if name != cls.name:
            raise ConfigError(
                f"{origin} holds a {name}; load it with spectral_pod.{models.MODELS[name].__name__}"
            )
        model = cls.__new__(cls)
        model.use(trained)
        return model

    def __call__(self, tokens_BL: Any) -> jax.Array:
        """float32 logits of int tokens [B, L]; positions with `shapes.PAD` are padding.

        Raises:
          DataError: these are no such tokens. The values of arrays on devices are not looked at.
        """
        if not isinstance(tokens_BL, jax.Array):
            tokens_BL = self._checked_tokens(tokens_BL)
        multiple = self.module.config.stride
        shape = tokens_BL.shape
        is_batch = len(shape) == 2 and min(shape) > 0 and shape[1] % multiple == 0
        if not is_batch or not jnp.issubdtype(tokens_BL.dtype, jnp.integer):
            raise DataError(
                f"tokens_BL is {tokens_BL.dtype}{list(shape)}; it must be of integers [B, L], L a "
                f"multiple of {multiple}"
            )
        with on_mesh(self.mesh):
            return _apply(self.module, self.params, jnp.asarray(tokens_BL, jnp.int32))

    def _checked_tokens(self, tokens: Any) -> np.ndarray:
        try:
            array = np.asarray(tokens)
        except (TypeError, ValueError) as error:
            raise DataError(f"tokens_BL is no array of integers: {error}") from error
        top = self._trained.vocab_size
        if array.dtype.kind in "iu" and array.size and not 0 <= array.min() <= array.max() < top:
            raise DataError(
                f"tokens_BL has values from {array.min()} to {array.max()}; they must be in "
                f"[0, {top})"
            )
        return array

    @property
    def is_trained(self) -> bool:
        return self._trained.step > 0

    @property
    def num_classes(self) -> int:
        """Of the logits."""
        return self._trained.num_classes

    def count_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.params))


class SpectralModel(Model):
    """A classifier of byte sequences.

    >>> config = Config(num_layers=2, hidden_dim=16, embed_dim=8, data={"seq_len": 64})
    >>> model = SpectralModel(config, num_classes=10)
    >>> f"{model.count_parameters():,} parameters"
    '10,652 parameters'
    >>> model.classify(b"a record of bytes").shape
    (10,)
    """

    name, default_task = "spectral_model", "content_type"

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by logit; empty where the model has not been trained."""
        return self._trained.classes

    def classify(self, *documents: bytes) -> np.ndarray:
        """float32 logits [C] of one record; a document has at most `config.data.seq_len` bytes.

        For a batch, call the model with int tokens [B, L], L a multiple of the patch stride (4 by
        default): it returns [B, C].

        Raises:
          DataError: a document is no bytes, is empty or too long, or the number of documents is
            wrong.
        """
        data = self.config.data
        if len(documents) != data.documents:
            raise DataError(f"{len(documents)} documents; a record here has {data.documents}")
        with on_mesh(self.mesh):
            rows = num_shards("batch")
        tokens_BKL = np.full((rows, data.documents, data.seq_len), PAD, np.int32)
        for i, document in enumerate(documents):
            if not isinstance(document, (bytes, bytearray)):
                raise DataError(f"a document is {shown(document)}; it must be bytes")
            if not 0 < len(document) <= data.seq_len:
                raise DataError(
                    f"a document of {len(document)} bytes; this model takes 1 to {data.seq_len}"
                )
            tokens_BKL[:, i, : len(document)] = np.frombuffer(document, np.uint8)
        return np.asarray(self(tokens_BKL.reshape(rows, -1)))[0]


class _LanguageModel(Model):
    default_task = "lm"

    def __init__(self, config: ConfigDict, *, mesh: Mesh | None = None):
        data = _checked_config(config).data
        task = tasks.make(data.task or self.default_task, data.options)
        super().__init__(config, num_classes=task.num_classes, mesh=mesh)

    def generate(
        self,
        prompt: AnyStr,
        *,
        max_length: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | bytes = "",
    ) -> AnyStr:
        """Continues a prompt; returns the continuation without the prompt.

        Args:
          prompt: at least one byte. The result has its type; in a str, U+FFFD replaces bytes that
            are not valid UTF-8.
          max_length: maximum number of bytes; there are fewer if the document ends.
          temperature, top_k, top_p: see `generate.sampling.Sampling`.
          seed: sampling seed; equal seeds give equal texts on every mesh.
          stop: the text ends before the first occurrence of this; empty for none.

        Raises:
          ConfigError: the prompt is empty, an argument is out of its range, or the model does not
            predict bytes.
        """
        given = _checked_text(prompt, "prompt")
        if not given:
            raise ConfigError("prompt is empty; give at least one byte to continue")
        sampling = Sampling(
            _checked(NonNegativeFloat, temperature, "temperature"),
            _checked(NonNegative, top_k, "top_k"),
            _checked(Probability, top_p, "top_p"),
        )
        with on_mesh(self.mesh):
            pieces = continuations(
                self._trained,
                [given],
                num_bytes=_checked(NonNegative, max_length, "max_length"),
                seed=_checked(int, seed, "seed"),
                sampling=sampling,
                stop=_checked_text(stop, "stop"),
            )
            written = b"".join(piece for (piece,) in pieces)
        return written.decode(errors="replace") if isinstance(prompt, str) else written


class SpectralGPT(_LanguageModel):
    """A language model of bytes: causal long convolutions with delta memories.

    >>> model = SpectralGPT(Config(num_layers=2, hidden_dim=16, data={"seq_len": 64}))
    >>> f"{model.count_parameters():,} parameters"
    '20,275 parameters'
    >>> len(model.generate(b"The signal processing approach", max_length=8))
    8
    """

    name = "spectral_gpt"


class SpectralLLM(_LanguageModel):
    """A language model of bytes: harmonic embeddings and wavelet attention.

    >>> config = Config(num_layers=1, hidden_dim=16, wavelet={"levels": 2}, data={"seq_len": 64})
    >>> model = SpectralLLM(config)
    >>> isinstance(model.generate("The signal processing approach", max_length=8), str)
    True
    """

    name = "spectral_llm"


def _checked(annotation: Any, value: Any, name: str) -> Any:
    """The value of an argument, which numbers of NumPy may be, if its annotation accepts it."""
    value = value.item() if isinstance(value, np.generic) else value
    fields.check(annotation, value, name)
    return value


def _checked_text(text: Any, name: str) -> bytes:
    if not isinstance(text, (str, bytes)):
        raise ConfigError(f"{name} is {shown(text)}; it must be str or bytes")
    try:
        return text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} is {shown(text)}, which is no Unicode text: {error}") from error


def _checked_config(config: Any) -> ConfigDict:
    if not isinstance(config, ConfigDict) or not {"data", "model", "seed"} <= set(config):
        raise ConfigError(f"config is {shown(config)}; make one by spectral_pod.Config")
    return config


def _checked_mesh(mesh: Any) -> Mesh | None:
    if mesh is not None and not (isinstance(mesh, Mesh) and set(mesh.axis_names) == set(AXES)):
        raise ConfigError(f"mesh is {shown(mesh)}; make one by parallel.mesh.make_mesh")
    return mesh


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: Module, params: Any, tokens_BL: jax.Array) -> jax.Array:
    return chunks.logits(module, {"params": params}, tokens_BL, tokens_BL != PAD)
