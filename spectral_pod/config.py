"""The configuration: its fields with their defaults.

A file in `configs/` starts from `default()` and sets the fields of its experiment. On the command
line any field can be overridden, as in `--config.train.total_steps=60`. Annotations state which
values a field accepts (`fields.py`); `validation.py` checks what depends on several fields.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from ml_collections import ConfigDict

from spectral_pod.errors import ConfigError
from spectral_pod.fields import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    NonNegativeTime,
    Positive,
    Share,
    types_of,
)
from spectral_pod.layers.architecture import ModelConfig
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.patching import Patches
from spectral_pod.storage import Folder, LocalFolder, Source


@dataclasses.dataclass
class DataConfig:
    task: str = ""  # a name in data.tasks.TASKS
    # Options of the task: the fields of its class in data/tasks.
    options: Any = dataclasses.field(default_factory=ConfigDict)
    # Existing stores that replace the task's own: paths, or pairs of a path and a mixture weight.
    stores: tuple[Any, ...] = ()
    dir: Folder = "~/.cache/spectral_pod"  # folder or gs:// URL below which stores are written once
    copies_dir: LocalFolder = "~/.cache/spectral_pod/copies"  # copies of stores read from gs://
    copies_gb: NonNegativeFloat = 0.0  # disk limit for copies, in GB; 0 disables
    # Bytes per document, or per window of a language model. Longer documents are an error, unless
    # `truncate` cuts them.
    seq_len: Positive = 2048
    documents: int = 1  # per record; two are encoded separately and then compared
    truncate: bool = False  # cuts documents to `seq_len`
    train_records: NonNegative = 0  # trains on the first n records only; 0: on all
    threads: Positive = 2  # threads that read batches in advance
    prefetch: Positive = 8  # batches that are read in advance


if TYPE_CHECKING:

    class ModelSections(ModelConfig):
        """`ModelConfig` with the sections of the encoder and of the mixers (`Mixer.section`)."""

        patch: Patches
        spectral: Any
        hyena: Any
        wavelet: Any
        frequency: Any
        attention: Any
        s5: Any
        selective: Any
        memory: Any
        scales: Any
else:
    ModelSections = ModelConfig


@dataclasses.dataclass
class OptimizerConfig:
    name: str = "adamw"  # a name in train.optim.OPTIMIZERS
    # The peak, between linear warm-up and cosine decay to zero.
    learning_rate: NonNegativeFloat = 1e-3
    # The peak for filters, decays, gates and memory scales.
    dynamics_learning_rate: NonNegativeFloat = 1e-3
    warmup_steps: Positive = 100  # steps of linear warm-up
    weight_decay: NonNegativeFloat = 0.05  # of kernels and embeddings only
    b1: Fraction = 0.9  # decay rates of the averages of gradients and of their squares
    b2: Fraction = 0.98
    clip_norm: NonNegativeFloat = 1.0  # the largest global norm of a gradient; 0: no clipping
    # Decay of an exponential average of the parameters, which is then what is evaluated and used.
    average: Fraction = 0.0
    # The share of the frequencies of spectral filters that are in use in the end; 1: all, and none
    # is selected. The others are zero, and exports leave them out (`train/selection.py`).
    frequencies: Share = 1.0
    selection_every_steps: Positive = 50  # steps between selections of frequencies
    selection_end: Fraction = 0.75  # the share of all steps after which the selection is fixed
    # The share of the frequencies in use that the first selections replace; it falls to zero.
    selection_regrowth: Fraction = 0.3


@dataclasses.dataclass
class TrainConfig:
    total_steps: Positive = 1000  # optimizer steps
    # The workdir of a run whose newest parameters are the initial ones; "": they are random.
    start_from: Source = ""
    global_batch_size: Positive = 32  # records per optimizer step, over all devices
    grad_accumulation: Positive = 1  # micro-batches per optimizer step
    label_smoothing: Fraction = 0.0  # weight of the uniform distribution in the labels
    log_every_steps: Positive = 20  # steps between lines of training metrics
    eval_every_steps: Positive = 500  # steps between evaluations on the validation split
    eval_batch_size: Positive = 64  # records per evaluation step, over all devices
    eval_split: Literal["train", "validation", "test"] = "test"  # split of the final evaluation
    eval_records: Positive = 1000  # records per evaluation, for tasks that generate their examples
    sample_bytes: NonNegative = 256  # bytes that a language model samples per validation; 0: none
    sample_prompt: str = "\n"  # the prompt of these samples
    # What happens at a step whose loss or update is not finite, or whose loss is a spike: the run
    # stops; or the update is skipped; or the run restores the newest checkpoint and continues after
    # the bad batch.
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    # A loss is a spike if it exceeds its running average by this factor; 0: no loss is.
    spike_factor: NonNegativeFloat = 0.0
    # The run stops at more bad steps in a row, or at more rollbacks to the same checkpoint.
    max_bad_steps: Positive = 10
    # The run ends as stalled after this many times the median time between steps without progress,
    # and at least `stall_seconds`; 0 disables the check.
    stall_factor: NonNegativeFloat = 20.0
    stall_seconds: NonNegativeTime = 600.0
    # First and last step of a trace for XProf; () is none. `touch WORKDIR/PROFILE` requests others.
    profile_steps: tuple[int, ...] = ()
    # Steps between probes of the layers (`train/probes.py`), metrics `probes/` and pictures: gates,
    # decays, filters, memories, activations, norms of gradients and updates by layer. 0: none.
    probe_every_steps: NonNegative = 0
    wandb_project: str = ""  # Weights & Biases project that also receives the metrics; "": none
    compilation_cache: bool = True  # keeps compiled programs in the workdir, for faster restarts


@dataclasses.dataclass
class CheckpointConfig:
    every_steps: Positive = 500  # steps between checkpoints
    keep_latest: Positive = 2  # newest checkpoints that are kept
    preemption_seconds: NonNegativeTime = 25.0  # a process exits at most this long after SIGTERM
    keep_best: NonNegative = 1  # best ones kept: by validation accuracy, language models by loss


@dataclasses.dataclass
class MeshConfig:
    data: int = -1  # splits batches; -1: all devices that the other axes leave
    fsdp: int = 1  # splits batches, and also parameters and optimizer state
    sequence: int = 1  # splits the positions of a sequence
    tensor: int = 1  # splits channels, hidden widths and heads


@dataclasses.dataclass
class Config:
    """All sections, for type checkers: at run time a configuration is a `ConfigDict` with these
    fields, which is what flags and `configs/` work on."""

    seed: int = 0  # determines initial parameters, dropout and the order of the data
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelSections = dataclasses.field(default_factory=ModelSections)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def default() -> Config:
    """A configuration with every field at its default, those of all sections included."""

    def config_dict(section: Any) -> ConfigDict:
        values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
        nested = dataclasses.is_dataclass
        return ConfigDict({k: config_dict(v) if nested(v) else v for k, v in values.items()})

    config = config_dict(Config())
    for name, options in model_sections().items():
        config.model[name] = ConfigDict({option: value for option, (_, value) in options.items()})
    return cast(Config, config)


def defaults_of(recorded: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The default configuration, with what fields mean that a recorded one is too old to have.

    Args:
      recorded: the configuration of a run, from its workdir or export.
      file: where it is recorded.

    Raises:
      ConfigError: something else is recorded than a configuration.
    """
    values = to_dict(default())
    for name, section in values.items():
        _check_section(recorded.get(name), section, file, f"config.{name}")
    model, theirs = values["model"], recorded["model"]
    model["hyena"]["order"] = model["s5"]["blocks"] = 1
    head_dim = theirs.get("memory", {}).get("head_dim", model["memory"]["head_dim"])
    if isinstance(head_dim, int) and head_dim > 0:
        model["memory"]["clip"] = 10 / math.sqrt(head_dim)
    return values


def _check_section(recorded: Any, default: Any, file: str, name: str) -> None:
    """Checks that what is recorded as a section is one; sections may be missing within others."""
    if not isinstance(default, Mapping):
        return
    if not isinstance(recorded, Mapping):
        raise ConfigError(f"{file} records no configuration: {name} is {recorded!r}")
    for key in recorded.keys() & default.keys():
        _check_section(recorded[key], default[key], file, f"{name}.{key}")


def fill(fields: dict[str, Any], defaults: Mapping[str, Any], prefix: str = "config") -> list[str]:
    """Adds missing fields with their defaults, in place; returns the names of these fields."""
    missing = []
    for name, value in defaults.items():
        if name not in fields:
            fields[name] = value
            missing.append(f"{prefix}.{name}")
        elif isinstance(value, Mapping):
            missing += fill(fields[name], value, f"{prefix}.{name}")
    return missing


def annotations() -> dict[str, Any]:
    """The annotations of all fields by their dotted names, except for the options of tasks."""
    sections = types_of(Config) | {"model": ModelConfig}
    held: dict[str, Any] = {"seed": sections.pop("seed")}
    held |= flat({name: types_of(section) for name, section in sections.items()})
    for name, options in model_sections().items():
        held |= {f"model.{name}.{option}": kind for option, (kind, _) in options.items()}
    del held["data.options"]
    return held


def model_sections() -> dict[str, dict[str, tuple[Any, Any]]]:
    """(annotation, default) of the fields of the sections of `config.model`, by section and name:
    of the encoder, and of all mixers.

    Raises:
      ConfigError: a mixer's section has the name of a field, or two mixers state an option
        differently.
    """
    types, patch = types_of(Patches), Patches()
    sections = {"patch": {name: (kind, getattr(patch, name)) for name, kind in types.items()}}
    taken = types_of(ModelConfig).keys() | sections.keys()
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
    sections.pop("", None)
    return sections


def to_dict(config: Config) -> dict[str, Any]:
    """A configuration as nested dictionaries, which are copies."""
    values: dict[str, Any] = cast(ConfigDict, config).to_dict()
    return values


def copy(config: Config) -> Config:
    """A copy of a configuration, which may be modified."""
    return cast(Config, cast(ConfigDict, config).copy_and_resolve_references())


def store_and_weight(entry: Any) -> tuple[Any, ...]:
    """The path and the weight of an entry of `data.stores`; the weight is 1 unless given."""
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry, 1.0)


def row_len(config: Config) -> int:
    """Tokens per row of a batch, which concatenates the documents of a record."""
    return config.data.seq_len * config.data.documents


def read_len(config: Config) -> int:
    """Tokens of a row that the model reads at a time: all, or those of a chunk."""
    return int(config.model.chunk) or row_len(config)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted names."""
    fields: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields
