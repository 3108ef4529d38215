"""Checks of a configuration before a run: each mistake is one message that names the field."""

import math
from typing import Any

from spectral_pod import fields, models, storage
from spectral_pod.config import Config, annotations, flat, store_and_weight, to_dict
from spectral_pod.data.tasks import TASKS, DrawnTask
from spectral_pod.errors import ConfigError
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.block import mixers_of
from spectral_pod.layers.feed_forward import CHANNEL_MIXERS
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.patching import LONGEST_NGRAM, Patches
from spectral_pod.models import MODELS
from spectral_pod.parallel.mesh import AXES
from spectral_pod.train.optim import OPTIMIZERS
from spectral_pod.train.selection import Schedule


def validate(config: Config) -> None:
    """Checks every field that can be checked without devices or data.

    Raises:
      ConfigError: names the field, its value and what it may be.
    """
    _check_fields(config)
    _check_model(config)
    _check_data(config)
    _check_training(config)


def _check_fields(config: Config) -> None:
    """Checks each field by itself."""
    known, values = annotations(), flat(to_dict(config))
    values = {field: x for field, x in values.items() if not field.startswith("data.options.")}
    for field in sorted(values.keys() - known.keys()):
        hint = fields.hint(f"config.{field}", [f"config.{name}" for name in known]).replace("'", "")
        raise ConfigError(f"config.{field} is no field of the configuration{hint}")
    for field in sorted(known.keys() - values.keys()):
        raise ConfigError(f"config.{field} is missing; start a config file with config.default()")
    fields.one_of("config.data.task", config.data.task, TASKS)
    fields.one_of("config.model.name", config.model.name, MODELS)
    fields.one_of("config.optimizer.name", config.optimizer.name, OPTIMIZERS)
    fields.one_of("config.model.channel_mixer", config.model.channel_mixer, CHANNEL_MIXERS)
    for field, annotation in known.items():
        fields.check(annotation, values[field], f"config.{field}")


def _check_training(config: Config) -> None:
    train = config.train
    if 0 < train.spike_factor <= 1:
        raise ConfigError(
            f"config.train.spike_factor is {train.spike_factor}; it is above 1, or 0: none"
        )
    if train.spike_factor and train.on_bad_step == "stop":
        raise ConfigError(
            "config.train.spike_factor is set, and train.on_bad_step is 'stop', for which a spike "
            "is no reason; choose 'skip' or 'rollback'"
        )
    if config.optimizer.frequencies < 1:
        _check_selection(config)
    match train.profile_steps:
        case []:
            pass
        case [first, last] if 1 <= first <= last:
            pass
        case other:
            raise ConfigError(
                f"config.train.profile_steps is {other}; it is () or (first, last), 1 <= first <= "
                "last"
            )
    if not MODELS[config.model.name].causal or not train.sample_bytes:
        return
    for mixer in mixers_of(models.architecture(config)).values():
        for field, value in mixer.sees_future:
            if get(config, field) == value:
                raise ConfigError(
                    f"config.{field} is {value!r}, with which positions see later ones: such a "
                    "model cannot write samples; set config.train.sample_bytes=0"
                )
    if not train.sample_prompt:
        raise ConfigError("config.train.sample_prompt is empty; samples continue at least a byte")
    try:
        train.sample_prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"config.train.sample_prompt is no text: {error}") from error


def _check_selection(config: Config) -> None:
    """Checks that there are frequencies to be selected, and that there is time for it."""
    Schedule.of(config)
    described = models.architecture(config)
    if not any(mixer.has_frequencies(described) for mixer in mixers_of(described).values()):
        raise ConfigError(
            f"config.optimizer.frequencies is {config.optimizer.frequencies}, and no mixer of the "
            "model learns a function of frequency, as 'spectral' does with model.spectral."
            "parametrization 'frequency' and 'selective' in models that are not causal; 1 selects "
            "none"
        )


def _check_data(config: Config) -> None:
    data, model, task = config.data, MODELS[config.model.name], TASKS[config.data.task]
    objective, pooling = task.objective, config.model.pooling
    if model.causal != (objective.by_position and objective.for_causal_models):
        fitting = sorted(name for name, other in MODELS.items() if other.causal != model.causal)
        raise ConfigError(
            f"config.model.name is {config.model.name!r}, which predicts "
            f"{'every next token' if model.causal else 'one class a record'}; task "
            f"{data.task!r} needs one of {fitting}"
        )
    if not model.causal and (pooling == "none") != objective.by_position:
        labelled = "every byte has a label" if objective.by_position else "every record has a label"
        raise ConfigError(
            f"config.model.pooling is {pooling!r}; in task {data.task!r} {labelled}, which "
            + ("needs 'none'" if objective.by_position else "needs another")
        )
    if not model.causal and pooling == "none" and config.model.patch.stride > 1:
        raise ConfigError(
            f"config.model.patch.stride is {config.model.patch.stride}; in task {data.task!r} "
            "every byte has a label, which needs 1"
        )
    for entry in data.stores:
        match store_and_weight(entry):
            case (str(path), int() | float() as weight) if 0 < weight < math.inf:
                storage.place(path, "config.data.stores", root=True)
                continue
        raise ConfigError(
            f"config.data.stores has {entry!r}; an entry is a path, or a path and a weight above 0"
        )
    if data.stores and issubclass(task, DrawnTask):
        raise ConfigError(
            f"config.data.stores is set, and examples of {data.task!r} are never stored"
        )
    if not 1 <= data.documents <= model.max_documents:
        two = ", or two that are compared" if model.max_documents == 2 else ""
        raise ConfigError(
            f"config.data.documents is {data.documents}; a record of {config.model.name} is one "
            f"document{two}"
        )
    if config.model.comparison != "plain" and data.documents == 1:
        raise ConfigError(
            f"config.model.comparison is {config.model.comparison!r}, and a record is one document "
            "(config.data.documents)"
        )
    stride = models.bytes_per_position(config)
    if chunk := config.model.chunk:
        _check_chunks(config, chunk, stride)
    if data.seq_len % stride:
        raise ConfigError(
            f"config.data.seq_len is {data.seq_len}; it must be a multiple of {stride}, the bytes "
            "of a patch (config.model.patch.stride)"
        )


def _check_chunks(config: Config, chunk: int, stride: int) -> None:
    data, model = config.data, config.model
    if data.seq_len % chunk or chunk % stride:
        raise ConfigError(
            f"config.model.chunk is {chunk}; it must be a multiple of {stride}, the bytes of a "
            f"position, and divide config.data.seq_len = {data.seq_len}"
        )
    if data.documents > 1:
        raise ConfigError(
            f"config.model.chunk is {chunk}; records of config.data.documents = {data.documents} "
            "are read whole, with 0"
        )
    for field, value in (("positions", "learned"), ("pooling", "last")):
        used = MODELS[model.name].causal == (field == "positions")
        if used and get(config, f"model.{field}") == value:
            raise ConfigError(
                f"config.model.{field} is {value!r}, which counts from the start of a row; with "
                f"config.model.chunk = {chunk} choose another"
            )


def _check_model(config: Config) -> None:
    model, scales = MODELS[config.model.name], config.model.coarser_scales
    if any(ratio < 2 for ratio in scales):
        raise ConfigError(f"config.model.coarser_scales is {scales}; a ratio is 2 or more")
    if scales and not model.reads_patches:
        raise ConfigError(
            f"config.model.coarser_scales is {scales}; {config.model.name} has no patches"
        )
    patch = config.model.patch
    if not all(1 <= n <= LONGEST_NGRAM for n in patch.ngrams):
        raise ConfigError(
            f"config.model.patch.ngrams is {patch.ngrams}; they are numbers of bytes from 1 to "
            f"{LONGEST_NGRAM}"
        )
    if patch.ngrams and not model.reads_patches:
        raise ConfigError(
            f"config.model.patch.ngrams is {patch.ngrams}; {config.model.name} has no patches"
        )
    if 0 < patch.kernel < patch.stride:
        raise ConfigError(
            f"config.model.patch.kernel is {patch.kernel}, less than the bytes of a patch, "
            f"config.model.patch.stride = {patch.stride}"
        )
    if int(config.model.mlp_expansion * config.model.hidden_dim) < 1:
        raise ConfigError(
            f"config.model.mlp_expansion is {config.model.mlp_expansion}, which leaves no hidden "
            f"channel of model.hidden_dim = {config.model.hidden_dim}"
        )
    if model.causal and config.model.normalization == "batch":
        raise ConfigError(
            "config.model.normalization is 'batch', by which positions see later ones in training; "
            f"{config.model.name} is causal"
        )
    if config.model.consistency_weight and not model.has_consistency_loss:
        raise ConfigError(
            f"config.model.consistency_weight is {config.model.consistency_weight}, and "
            f"{config.model.name} has no consistency loss"
        )
    if config.model.memory.gated and config.model.pattern:
        raise ConfigError(
            "config.model.memory.gated chooses the memories of the default pattern; name "
            f"'gated_delta' in config.model.pattern, which is {tuple(config.model.pattern)}"
        )
    for block in models.pattern(config):
        names = block.split("+")
        for name in names:
            fields.one_of("config.model.pattern", name, MIXERS)
            if model.causal and not MIXERS[name].can_be_causal:
                raise ConfigError(
                    f"config.model.pattern has {name!r}, which sees the whole sequence: "
                    f"{config.model.name} is causal"
                )
        if len(names) != len(set(names)):
            raise ConfigError(f"config.model.pattern has {block!r}, which names a mixer twice")
    described = models.architecture(config)
    for mixer in mixers_of(described).values():
        mixer.configured(described)  # fields of other sections may be missing
        mixer.check(described)
        for field, by in mixer.divisible:
            if not by.startswith("mesh.") and get(config, field) % get(config, by):
                raise ConfigError(
                    f"config.{field} is {get(config, field)}, not divisible by config.{by} = "
                    f"{get(config, by)}"
                )


def validate_mesh(config: Config, num_devices: int) -> dict[str, int]:
    """The size of every mesh axis for this many devices.

    Raises:
      ConfigError: the axes do not multiply to the devices, or a dimension cannot be split.
    """
    sizes = _axis_sizes(config, num_devices)
    described = models.architecture(config)
    wrong = [one for one in _divisions(config, described, sizes) if one[1] % one[2]]
    if wrong:
        faults = [
            f"config.{field} is {n}, not divisible by {why} = {d}" for field, n, d, why in wrong
        ]
        flags = [_nearest(field, n, d) for field, n, d, _ in wrong if field.endswith("batch_size")]
        hint = f". The nearest that are: {' '.join(flags)}" if flags else ""
        raise ConfigError("; ".join(faults) + hint)
    sequence = sizes["sequence"]
    patches = config.data.seq_len // described.stride
    looks_back = {name: mixer.halo(described) for name, mixer in mixers_of(described).items()}
    if MODELS[config.model.name].reads_patches:
        looks_back["the patch encoder"] = Patches(**described.sections["patch"]).halo
    for name, halo in sorted(looks_back.items()):
        if sequence > 1 and patches // sequence < halo:
            raise ConfigError(
                f"config.mesh.sequence is {sequence}, which leaves a device "
                f"{patches // sequence} positions; {name} looks {halo} back"
            )
    channels = config.model.hidden_dim // sizes["tensor"]
    linear = config.model.spectral.padding == "linear"
    if channels % sequence and not (linear and patches % sequence**2 == 0):
        raise ConfigError(
            f"config.mesh.sequence is {sequence}: to split sequences of {patches} patches so far, "
            f"either model.hidden_dim / mesh.tensor = {channels} must be a multiple of it, or "
            f"model.spectral.padding 'linear' and the patches a multiple of {sequence**2}"
        )
    return sizes


def _nearest(field: str, value: int, divisor: int) -> str:
    """The flag that sets a field to the multiple of the divisor that is nearest to its value."""
    return f"--config.{field}={max(divisor, (value + divisor // 2) // divisor * divisor)}"


def _axis_sizes(config: Config, num_devices: int) -> dict[str, int]:
    sizes: dict[str, int] = {axis: getattr(config.mesh, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and not (axis == "data" and size == -1):
            raise ConfigError(f"config.mesh.{axis} is {size}; it must be at least 1")
    others = math.prod(size for axis, size in sizes.items() if axis != "data")
    if sizes["data"] == -1:
        sizes["data"] = max(1, num_devices // others)
    if math.prod(sizes.values()) != num_devices:
        raise ConfigError(
            f"config.mesh asks for {' x '.join(f'{a}={n}' for a, n in sizes.items())} = "
            f"{math.prod(sizes.values())} devices, and there are {num_devices}; change an axis "
            "(mesh.data=-1 takes what the others leave)"
        )
    return sizes


def _divisions(
    config: Config, described: Architecture, sizes: dict[str, int]
) -> list[tuple[str, int, int, str]]:
    """The divisibility constraints: (field, its value, the divisor, the fields that give it)."""
    train, model = config.train, config.model
    rows, sequence = sizes["data"] * sizes["fsdp"], sizes["sequence"]
    stride, scales = described.stride, model.coarser_scales
    patches = f"data.seq_len in patches of {stride}", config.data.seq_len // stride
    divisions = [
        ("train.global_batch_size", train.global_batch_size, rows * train.grad_accumulation,
         "mesh.data x mesh.fsdp x train.grad_accumulation"),
        ("train.eval_batch_size", train.eval_batch_size, rows, "mesh.data x mesh.fsdp"),
        ("model.hidden_dim", model.hidden_dim, sizes["tensor"] * sizes["fsdp"],
         "mesh.fsdp x mesh.tensor"),
        (*patches, sequence * (math.prod(scales) if sequence > 1 else 1),
         "mesh.sequence" + (" x model.coarser_scales" if scales else "")),
        ("model.embed_dim", model.embed_dim, sizes["fsdp"], "mesh.fsdp"),
        ("model.hidden_dim x model.mlp_expansion", int(model.hidden_dim * model.mlp_expansion),
         sizes["tensor"], "mesh.tensor"),
    ]  # fmt: skip
    for name, mixer in mixers_of(described).items():
        if sequence > 1 and (merged := mixer.merges(described)) > 1:
            why = f"mesh.sequence x the {merged} that {name} merges to one"
            divisions.append((*patches, sequence * merged, why))
        for field, by in mixer.divisible:
            if by.startswith("mesh."):
                size = sizes[by.removeprefix("mesh.")]
                divisions.append((field, get(config, field), size, by))
    return divisions


def get(config: Config, field: str) -> Any:
    """The value of a field by its dotted name."""
    value: Any = config
    for name in field.split("."):
        value = value[name]
    return value
