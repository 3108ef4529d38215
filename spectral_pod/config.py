"""The configuration: its fields with their defaults.

A file in `configs/` takes `default()` and sets what its experiment needs; any field is overridden
as `--config.train.total_steps=60`. Annotations say what a value may be (`fields.py`); what depends
on more than one field is checked in `validation.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from ml_collections import ConfigDict

from spectral_pod.errors import ConfigError
from spectral_pod.fields import Fraction, NonNegative, NonNegativeFloat, Positive, types_of
from spectral_pod.layers.architecture import ModelConfig
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.mixers import MIXERS


@dataclasses.dataclass
class DataConfig:
    task: str = ""  # a name in data/tasks
    options: Any = dataclasses.field(default_factory=ConfigDict)  # fields of the task
    # Finished stores in place of the task's own: paths, or pairs of a path and its weight.
    stores: tuple[Any, ...] = ()
    dir: str = "~/.cache/spectral_pod"  # byte stores are written once below it; a folder or gs://
    copies_dir: str = "~/.cache/spectral_pod/copies"  # on disk, of what is read from gs://
    copies_gb: NonNegativeFloat = 0.0  # disk limit for copies, in GB; 0 disables
    seq_len: Positive = 2048  # bytes of a document; longer ones are an error unless `truncate`
    documents: int = 1  # in a record; 2 are encoded alike and then compared
    truncate: bool = False
    train_records: NonNegative = 0  # use only the first n training records; 0 is all
    threads: Positive = 2  # that read batches ahead
    prefetch: Positive = 8  # batches ready ahead of the step


if TYPE_CHECKING:

    class ModelSections(ModelConfig):
        """With the sections of the mixers of this project (`Mixer.section`)."""

        spectral: Any
        hyena: Any
        wavelet: Any
        frequency: Any
        attention: Any
        s5: Any
        selective: Any
        memory: Any
else:
    ModelSections = ModelConfig


@dataclasses.dataclass
class OptimizerConfig:
    name: str = "adamw"  # a name in train/optim.py
    learning_rate: float = 1e-3  # peak, after `warmup_steps`, before cosine decay to zero
    dynamics_learning_rate: float = 1e-3  # of filters, gates and memory scales
    warmup_steps: Positive = 100
    weight_decay: float = 0.05  # of kernels and embeddings only
    b1: float = 0.9
    b2: float = 0.98
    clip_norm: float = 1.0  # global gradient norm


@dataclasses.dataclass
class TrainConfig:
    total_steps: Positive = 1000
    global_batch_size: Positive = 32
    grad_accumulation: Positive = 1  # micro-batches a step
    label_smoothing: Fraction = 0.0
    log_every_steps: Positive = 20
    eval_every_steps: Positive = 500  # on the validation split
    eval_batch_size: Positive = 64
    eval_split: Literal["train", "validation", "test"] = "test"  # of the evaluation at the end
    eval_records: Positive = 1000  # of tasks whose examples are drawn
    sample_bytes: NonNegative = 256  # that a language model writes at every validation; 0: none
    sample_prompt: str = "\n"  # which they continue
    # What becomes of a step whose loss or update is not finite, or whose loss is a spike: its
    # update is skipped, or the run goes back to the newest checkpoint and on behind the bad batch.
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    spike_factor: NonNegativeFloat = 0.0  # a spike exceeds the average loss so many times; 0: none
    max_bad_steps: Positive = 10  # in a row, or rollbacks to one checkpoint; then the run stops
    stall_factor: NonNegativeFloat = 20.0  # a hang exceeds a step's time so many times; 0: no watch
    stall_seconds: NonNegativeFloat = 600.0  # and takes at least so long
    profile_steps: tuple[int, ...] = ()  # (first, last): traced for XProf; later: `touch PROFILE`
    wandb_project: str = ""  # Weights & Biases shows the metrics, too
    compilation_cache: bool = True  # in the workdir: a restart compiles nothing again


@dataclasses.dataclass
class CheckpointConfig:
    every_steps: Positive = 500
    keep_latest: Positive = 2
    preemption_seconds: NonNegativeFloat = 25.0  # from SIGTERM to the end of a process, at most
    keep_best: NonNegative = 1  # by validation accuracy, language models by loss


@dataclasses.dataclass
class MeshConfig:
    data: int = -1  # -1: all devices that the other axes leave
    fsdp: int = 1  # splits parameters and optimizer state
    sequence: int = 1
    tensor: int = 1  # splits channels, hidden widths and heads


@dataclasses.dataclass
class Config:
    """All sections, for type checkers: at run time a configuration is a `ConfigDict` with these
    fields, which is what flags and `configs/` work on."""

    seed: int = 0  # decides initial parameters, dropout and the order of the data
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelSections = dataclasses.field(default_factory=ModelSections)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def default() -> Config:
    """Every field that exists, with the value it has unless an experiment sets it."""

    def config_dict(section: Any) -> ConfigDict:
        values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
        nested = dataclasses.is_dataclass
        return ConfigDict({k: config_dict(v) if nested(v) else v for k, v in values.items()})

    config = config_dict(Config())
    for name, options in mixer_options().items():
        config.model[name] = ConfigDict({option: value for option, (_, value) in options.items()})
    return cast(Config, config)


def annotations() -> dict[str, Any]:
    """The annotations of all fields by their dotted names, without the options of tasks."""
    sections = types_of(Config) | {"model": ModelConfig}
    held: dict[str, Any] = {"seed": sections.pop("seed")}
    held |= flat({name: types_of(section) for name, section in sections.items()})
    for name, options in mixer_options().items():
        held |= {f"model.{name}.{option}": kind for option, (kind, _) in options.items()}
    del held["data.options"]
    return held


def mixer_options() -> dict[str, dict[str, tuple[Any, Any]]]:
    """Annotations and defaults of the options of all mixers, by section.

    Raises:
      ConfigError: a mixer's section has the name of a field, or two mixers state an option
        differently.
    """
    sections: dict[str, dict[str, tuple[Any, Any]]] = {}
    taken = types_of(ModelConfig)
    for mixer in (*MIXERS.values(), *CHANNEL_MIXERS.values()):
        name, options = mixer.section, mixer.options()
        if (options and not name) or name in taken:
            raise ConfigError(
                f"{mixer.__name__}.section is {name!r}; a mixer's options {list(options)} need a "
                f"section whose name is no field of config.model"
            )
        section = sections.setdefault(name, {})
        for option, value in options.items():
            if section.setdefault(option, value) != value:
                raise ConfigError(
                    f"{mixer.__name__} states config.model.{name}.{option} otherwise than another "
                    "mixer of this section: give it a section of its own"
                )
    del sections[""]
    return sections


def to_dict(config: Config) -> dict[str, Any]:
    """A configuration as nested dictionaries; changing them does not change it."""
    values: dict[str, Any] = cast(ConfigDict, config).to_dict()
    return values


def copy(config: Config) -> Config:
    """A configuration of the same values, to be changed."""
    return cast(Config, cast(ConfigDict, config).copy_and_resolve_references())


def store_and_weight(entry: Any) -> tuple[Any, ...]:
    """An entry of `data.stores`, in full."""
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry, 1.0)


def row_len(config: Config) -> int:
    """Tokens in a row of a batch: the documents of a record, side by side."""
    return config.data.seq_len * config.data.documents


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a nested tree by their dotted names."""
    fields: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields
