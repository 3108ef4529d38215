"""The configuration: its defaults, its checks, and what may change between two starts of a run.

A file in `configs/` takes `default()` and sets what its experiment needs; any field is overridden
as `--config.train.total_steps=60`.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pywt
from etils import epath
from ml_collections import ConfigDict

from spectral_pod import storage
from spectral_pod.errors import ConfigError

# Where a restart may differ: none changes the numbers of a run beyond float rounding.
_FREE_TO_CHANGE = (
    "mesh.", "checkpoint.", "data.dir", "data.stores", "data.threads", "data.prefetch",
    "data.copies_", "train.eval_", "train.log_every_steps", "train.compilation_cache",
    "train.stall_", "train.profile_steps", "train.wandb_project",
)  # fmt: skip


def default() -> ConfigDict:
    """Every field that exists, with the value it has unless an experiment sets it."""
    c = ConfigDict()
    c.seed = 0  # decides initial parameters, dropout and the order of the data

    c.data = ConfigDict()
    c.data.task = ""  # a name in data/tasks
    c.data.options = ConfigDict()  # keyword arguments of the task's `build`
    # Finished stores in place of the task's own: paths, or pairs of a path and its weight.
    c.data.stores = ()
    c.data.dir = "~/.cache/spectral_pod"  # byte stores are written once below it; a folder or gs://
    c.data.copies_dir = "~/.cache/spectral_pod/copies"  # on disk, of what is read from gs://
    c.data.copies_gb = 0.0  # that they may take; 0: none
    c.data.seq_len = 2048  # bytes of a document; longer ones are an error unless `truncate`
    c.data.documents = 1  # in a record; 2 are encoded alike and then compared
    c.data.truncate = False
    c.data.train_records = 0  # use only the first n training records; 0 is all
    c.data.threads = 2  # that read batches ahead
    c.data.prefetch = 8  # batches ready ahead of the step

    c.model = ConfigDict()
    c.model.name = "spectral_model"
    c.model.dtype = "bfloat16"  # of activations and products; parameters are float32
    c.model.pattern = ()  # blocks, repeating: ('hyena', 'hyena+delta'); () is the model's own
    c.model.channel_mixer = "gated"  # or 'frequency', with a causal long filter beside it
    c.model.context = 0  # positions that a causal model is made for; 0: data.seq_len
    c.model.positions = "learned"  # or 'none'; of causal models
    c.model.consistency_weight = 0.0  # of spectral_llm's loss between spectra
    c.model.num_layers = 6
    c.model.hidden_dim = 256
    c.model.embed_dim = 256  # width of byte embeddings before patching
    c.model.coarser_scales = ()  # of spectral_model: (4, 4) adds views by 4 and 16 patches
    c.model.mlp_expansion = 1.0  # hidden width of the channel mixer over hidden_dim
    c.model.memory_interval = 2  # every n-th block has a delta memory; 0: none
    c.model.norm = "pre"  # or 'post'
    c.model.pooling = "attention"  # or 'mean', 'last'
    c.model.dropout = 0.0
    c.model.unroll = 1  # repeats of the pattern written out: faster on CPUs, slow to compile
    c.model.remat = "none"  # or 'full', 'dots': what the backward pass computes again
    c.model.long_conv = "auto"  # or 'right_angle', 'real', 'matmul' (ops/long_conv.py)
    c.model.spectral = ConfigDict()
    c.model.spectral.padding = "linear"  # or 'circular'
    c.model.spectral.parametrization = "frequency"  # or 'time'
    c.model.spectral.method = "auto"  # or 'right_angle', 'real', 'matmul', 'plain' (ops/fft.py)
    c.model.spectral.energy_gate = "rms"  # or 'norm' (the original design), 'none'
    c.model.spectral.kernel_dropout = 0.0  # 'time' only
    c.model.spectral.kernel_threshold = 0.0  # 'time' only: soft threshold on taps
    c.model.hyena = ConfigDict()
    c.model.hyena.filter = "explicit"  # or 'implicit', an MLP of the lag
    c.model.hyena.decay = "learned"  # per channel; or 'fixed' at 0.01 (the original design)
    c.model.hyena.short_conv = 3  # width; 1 is none (the original design)
    c.model.wavelet = ConfigDict()
    c.model.wavelet.name = "db4"
    c.model.wavelet.levels = 3
    c.model.wavelet.num_heads = 4
    c.model.wavelet.padding = "linear"  # or 'circular' (the original design: sees the future)
    c.model.frequency = ConfigDict()  # of the channel mixer
    c.model.frequency.padding = "linear"  # or 'circular' (the original design: sees the future)
    c.model.attention = ConfigDict()  # of all kinds of attention
    c.model.attention.num_heads = 4
    c.model.attention.window = 128  # positions that local attention sees
    c.model.attention.rank = 64  # positions that linformer projects to
    c.model.s5 = ConfigDict()
    c.model.s5.state_dim = 64  # complex numbers
    c.model.selective = ConfigDict()
    c.model.selective.form = "low_rank"  # or 'broadcast' (the original design: no filter at all)
    c.model.selective.rank = 8  # filters that the input mixes
    c.model.memory = ConfigDict()
    c.model.memory.num_heads = 1
    c.model.memory.head_dim = 64
    c.model.memory.normalize_keys = True
    c.model.memory.gated = False  # the memory also forgets, by a learned rate per token and head
    c.model.memory.short_conv = 1  # width of a causal convolution of q, k, v; 1 is none
    c.model.memory.beta_min = 0.0
    c.model.memory.beta_max = 1.0
    c.model.memory.method = "chunked"  # or 'recurrent': the same numbers

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-3  # peak, after `warmup_steps`, before cosine decay to zero
    c.optimizer.dynamics_learning_rate = 1e-3  # of filters, gates and memory scales
    c.optimizer.warmup_steps = 100
    c.optimizer.weight_decay = 0.05  # of kernels and embeddings only
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.98
    c.optimizer.clip_norm = 1.0  # global gradient norm

    c.train = ConfigDict()
    c.train.total_steps = 1000
    c.train.global_batch_size = 32
    c.train.grad_accumulation = 1  # micro-batches a step
    c.train.label_smoothing = 0.0
    c.train.log_every_steps = 20
    c.train.eval_every_steps = 500  # on the validation split
    c.train.eval_batch_size = 64
    c.train.eval_split = "test"  # of the evaluation at the end
    c.train.eval_records = 1000  # of tasks whose examples are drawn
    c.train.sample_bytes = 256  # that a language model writes at every validation; 0: none
    c.train.sample_prompt = "\n"  # which they continue
    # What becomes of a step whose loss or update is not finite, or whose loss is a spike: 'stop',
    # 'skip' its update, or 'rollback' to the newest checkpoint and go on behind its batch.
    c.train.on_bad_step = "stop"
    c.train.spike_factor = 0.0  # a spike is so many times the average of the losses before; 0: none
    c.train.max_bad_steps = 10  # in a row, or rollbacks to one checkpoint; then the run stops
    c.train.stall_factor = 20.0  # a hang takes so many times as long as a step should; 0: no watch
    c.train.stall_seconds = 600.0  # and at least so long
    c.train.profile_steps = ()  # (first, last): traced for XProf; later ones by `touch PROFILE`
    c.train.wandb_project = ""  # Weights & Biases shows the metrics, too
    c.train.compilation_cache = True  # in the workdir: a restart compiles nothing again

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 500
    c.checkpoint.keep_latest = 2
    c.checkpoint.preemption_seconds = 25.0  # from SIGTERM to the end of a process, at most
    c.checkpoint.keep_best = 1  # by validation accuracy, language models by loss

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: all devices that the other axes leave
    c.mesh.fsdp = 1  # splits parameters and optimizer state
    c.mesh.sequence = 1
    c.mesh.tensor = 1  # splits channels, hidden widths and heads
    return c


_CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.norm": ("pre", "post"),
    "model.pooling": ("attention", "mean", "last"),
    "model.remat": ("none", "full", "dots"),
    "model.spectral.padding": ("linear", "circular"),
    "model.spectral.parametrization": ("frequency", "time"),
    "model.spectral.method": ("auto", "right_angle", "real", "matmul", "plain"),
    "model.spectral.energy_gate": ("rms", "norm", "none"),
    "model.long_conv": ("auto", "right_angle", "real", "matmul"),
    "model.channel_mixer": ("gated", "frequency"),
    "model.positions": ("learned", "none"),
    "model.wavelet.padding": ("linear", "circular"),
    "model.frequency.padding": ("linear", "circular"),
    "model.hyena.filter": ("explicit", "implicit"),
    "model.hyena.decay": ("learned", "fixed"),
    "model.selective.form": ("low_rank", "broadcast"),
    "model.memory.method": ("chunked", "recurrent"),
    "train.on_bad_step": ("stop", "skip", "rollback"),
    "train.eval_split": ("train", "validation", "test"),
}
_AT_LEAST_ONE = (
    "data.seq_len", "data.threads", "data.prefetch", "model.num_layers", "model.unroll",
    "model.hidden_dim", "model.embed_dim", "model.memory.num_heads", "model.memory.head_dim",
    "model.hyena.short_conv", "model.memory.short_conv",
    "model.wavelet.levels", "model.wavelet.num_heads",
    "model.attention.num_heads", "model.attention.window", "model.attention.rank",
    "model.s5.state_dim", "model.selective.rank",
    "train.total_steps", "train.global_batch_size", "train.grad_accumulation",
    "train.log_every_steps", "train.eval_records", "train.max_bad_steps",
    "train.eval_every_steps", "train.eval_batch_size", "checkpoint.every_steps",
    "checkpoint.keep_latest", "optimizer.warmup_steps",
)  # fmt: skip


def validate(
    config: ConfigDict,
    *,
    tasks: Mapping[str, Any],
    models: Mapping[str, Any],
    mixers: Mapping[str, bool],
) -> None:
    """Checks every field that can be checked without devices or data.

    `tasks` and `models` are those there are, by name; `mixers` says which of them can be causal.

    Raises:
      ConfigError: names the field, its value and what it may be.
    """
    known = flat(default().to_dict()).keys()
    mine = {field for field in flat(config.to_dict()) if not field.startswith("data.options.")}
    for field in sorted(mine - known):
        hint = "".join(f"; did you mean config.{f}?" for f in _near(field, known))
        raise ConfigError(f"config.{field} is no field of the configuration{hint}")
    for field in sorted(known - mine):
        raise ConfigError(f"config.{field} is missing; start a config file with config.default()")
    _one_of("data.task", config.data.task, tasks)
    _one_of("model.name", config.model.name, models)
    for field, choices in _CHOICES.items():
        _one_of(field, _get(config, field), choices)
    for field in _AT_LEAST_ONE:
        if _get(config, field) < 1:
            raise ConfigError(f"config.{field} is {_get(config, field)}; it must be at least 1")
    for field in (
        "model.memory_interval", "model.context", "checkpoint.keep_best", "data.train_records",
        "train.sample_bytes", "train.spike_factor", "train.stall_factor", "train.stall_seconds",
        "checkpoint.preemption_seconds", "data.copies_gb",
    ):  # fmt: skip
        if _get(config, field) < 0:
            raise ConfigError(f"config.{field} is {_get(config, field)}; it cannot be negative")
    for field in ("model.dropout", "model.spectral.kernel_dropout", "train.label_smoothing"):
        if not 0 <= _get(config, field) < 1:
            raise ConfigError(f"config.{field} is {_get(config, field)}; it must be in [0, 1)")
    if 0 < config.train.spike_factor <= 1:
        raise ConfigError(
            f"config.train.spike_factor is {config.train.spike_factor}; it is above 1, or 0: none"
        )
    if config.train.spike_factor and config.train.on_bad_step == "stop":
        raise ConfigError(
            "config.train.spike_factor is set, and train.on_bad_step is 'stop', for which a spike "
            "is no reason; choose 'skip' or 'rollback'"
        )
    if len(config.train.profile_steps) not in (0, 2):
        raise ConfigError(
            f"config.train.profile_steps is {config.train.profile_steps}; it is (first, last) or ()"
        )
    model = models[config.model.name]
    objective, causal, patch = (
        tasks[config.data.task].objective.name,
        model.causal,
        model.bytes_per_position,
    )
    _check_model(config, model, mixers)
    if causal != (objective != "class"):
        fitting = sorted(name for name, model in models.items() if model.causal != causal)
        raise ConfigError(
            f"config.model.name is {config.model.name!r}, which predicts "
            f"{'every next token' if causal else 'one class a record'}; task "
            f"{config.data.task!r} needs one of {fitting}"
        )
    for entry in config.data.stores:
        match store_and_weight(entry):
            case (str(), int() | float() as weight) if weight > 0:
                continue
        raise ConfigError(
            f"config.data.stores has {entry!r}; an entry is a path, or a path and a weight above 0"
        )
    if config.data.stores and objective == "positions":
        raise ConfigError(
            f"config.data.stores is set, and examples of {config.data.task!r} are never stored"
        )
    if config.data.documents not in ((1,) if causal else (1, 2)):
        raise ConfigError(
            f"config.data.documents is {config.data.documents}; a record of "
            f"{config.model.name} is one document{'' if causal else ', or two that are compared'}"
        )
    if config.data.seq_len % patch:
        raise ConfigError(
            f"config.data.seq_len is {config.data.seq_len}; it must be a multiple of {patch}, the "
            "bytes of a patch"
        )
    scales = config.model.coarser_scales
    if any(not isinstance(ratio, int) or ratio < 2 for ratio in scales):
        raise ConfigError(f"config.model.coarser_scales is {scales}; a ratio is an int, 2 or more")
    if scales and patch == 1:
        raise ConfigError(
            f"config.model.coarser_scales is {scales}; {config.model.name} has no patches"
        )
    if not 0 <= config.model.memory.beta_min < config.model.memory.beta_max <= 1:
        raise ConfigError(
            f"config.model.memory.beta_min, beta_max are {config.model.memory.beta_min}, "
            f"{config.model.memory.beta_max}; they need 0 <= beta_min < beta_max <= 1"
        )


def pattern(config: ConfigDict, mixer: str) -> tuple[str, ...]:
    """The blocks of a model, repeating: the config's own, or the model's `mixer` with a delta
    memory in every `memory_interval`-th block (0: in none)."""
    model = config.model
    if model.pattern:
        return tuple(model.pattern)
    interval = model.memory_interval
    if interval == 0 or interval > model.num_layers:
        return (mixer,)
    memory = "gated_delta" if model.memory.gated else "delta"
    return (mixer,) * (interval - 1) + (f"{mixer}+{memory}",)


def _mixers(config: ConfigDict, model: Any) -> set[str]:
    return {name for block in pattern(config, model.mixer) for name in block.split("+")}


def _check_model(config: ConfigDict, model: Any, known: Mapping[str, bool]) -> None:
    mixers = _mixers(config, model)
    for name in sorted(mixers):
        _one_of("model.pattern", name, known)
        if model.causal and not known[name]:
            raise ConfigError(
                f"config.model.pattern has {name!r}, which sees the whole sequence: "
                f"{config.model.name} is causal"
            )
    if any("attention" in name for name in mixers) or "linformer" in mixers:
        _divides(config, "model.hidden_dim", config.model.hidden_dim, "model.attention.num_heads")
    if "wavelet" in mixers:
        _divides(config, "model.hidden_dim", config.model.hidden_dim, "model.wavelet.num_heads")
        _one_of("model.wavelet.name", config.model.wavelet.name, _orthogonal_wavelets())
    if not (model.causal and config.train.sample_bytes):
        return
    for there, field in (
        ("wavelet" in mixers, "model.wavelet.padding"),
        (config.model.channel_mixer == "frequency", "model.frequency.padding"),
    ):
        if there and _get(config, field) == "circular":
            raise ConfigError(
                f"config.{field} is 'circular', with which positions see later ones: such a model "
                "cannot write samples; set config.train.sample_bytes=0"
            )
    if not config.train.sample_prompt:
        raise ConfigError("config.train.sample_prompt is empty; samples continue at least a byte")


def _orthogonal_wavelets() -> list[str]:
    families = [name for name in pywt.wavelist(kind="discrete") if name != "dmey"]
    return [name for name in families if pywt.Wavelet(name).orthogonal]


def _divides(config: ConfigDict, field: str, value: int, by: str) -> None:
    if value % _get(config, by):
        raise ConfigError(
            f"config.{field} is {value}, not divisible by config.{by} = {_get(config, by)}"
        )


def validate_mesh(
    config: ConfigDict, num_devices: int, *, models: Mapping[str, Any]
) -> dict[str, int]:
    """The size of every mesh axis for this many devices; `models` as for `validate`.

    Raises:
      ConfigError: the axes do not multiply to the devices, or a dimension cannot be split.
    """
    sizes = {axis: config.mesh[axis] for axis in ("data", "fsdp", "sequence", "tensor")}
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
    rows, tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
    accumulation = config.train.grad_accumulation
    model = models[config.model.name]
    mixers = _mixers(config, model)
    memory = bool(mixers & {"delta", "gated_delta"})
    attention = any("attention" in name for name in mixers) or "linformer" in mixers
    stride = model.bytes_per_position
    scales = config.model.coarser_scales
    patches, sequence = config.data.seq_len // stride, sizes["sequence"]
    for field, value, divisor, why in (
        ("train.global_batch_size", config.train.global_batch_size, rows * accumulation,
         "mesh.data x mesh.fsdp x train.grad_accumulation"),
        ("train.eval_batch_size", config.train.eval_batch_size, rows, "mesh.data x mesh.fsdp"),
        ("model.hidden_dim", config.model.hidden_dim, tensor * sizes["fsdp"],
         "mesh.fsdp x mesh.tensor"),
        (f"data.seq_len in patches of {stride}", patches,
         sequence * (math.prod(scales) if sequence > 1 else 1),
         "mesh.sequence" + (" x model.coarser_scales" if scales else "")),
        ("model.embed_dim", config.model.embed_dim, sizes["fsdp"], "mesh.fsdp"),
        ("model.hidden_dim x model.mlp_expansion",
         int(config.model.hidden_dim * config.model.mlp_expansion), tensor, "mesh.tensor"),
        ("model.memory.num_heads", config.model.memory.num_heads if memory else 0, tensor,
         "mesh.tensor"),
        ("model.attention.num_heads", config.model.attention.num_heads if attention else 0, tensor,
         "mesh.tensor"),
        ("model.s5.state_dim", config.model.s5.state_dim if "s5" in mixers else 0, tensor,
         "mesh.tensor"),
    ):  # fmt: skip
        if value % divisor:
            raise ConfigError(f"config.{field} is {value}, not divisible by {why} = {divisor}")
    before = _looks_back(config)
    for name in sorted(mixers & before.keys()):
        if sequence > 1 and patches // sequence < before[name]:
            raise ConfigError(
                f"config.mesh.sequence is {sequence}, which leaves a device "
                f"{patches // sequence} positions; {name} looks {before[name]} back"
            )
    channels, linear = config.model.hidden_dim // tensor, config.model.spectral.padding == "linear"
    if channels % sequence and not (linear and patches % sequence**2 == 0):
        raise ConfigError(
            f"config.mesh.sequence is {sequence}: to split sequences of {patches} patches so far, "
            f"either model.hidden_dim / mesh.tensor = {channels} must be a multiple of it, or "
            f"model.spectral.padding 'linear' and the patches a multiple of {sequence**2}"
        )
    return sizes


def _looks_back(config: ConfigDict) -> dict[str, int]:
    """How many positions before its own a mixer asks of the device before."""
    model = config.model
    wavelet = pywt.Wavelet(model.wavelet.name)
    return {
        "local_attention": model.attention.window - 1,
        "hyena": model.hyena.short_conv - 1,
        "delta": model.memory.short_conv - 1,
        "gated_delta": model.memory.short_conv - 1,
        "wavelet": (wavelet.dec_len - 1) * (2**model.wavelet.levels - 1),
    }


def store_and_weight(entry: Any) -> tuple[Any, ...]:
    """An entry of `data.stores`, in full."""
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry, 1.0)


def row_len(config: ConfigDict) -> int:
    """Tokens in a row of a batch: the documents of a record, side by side."""
    return config.data.seq_len * config.data.documents


def claim_workdir(
    workdir: str, config: ConfigDict, data_digest: str, classes: Sequence[str] = ()
) -> None:
    """Records the configuration and the data of a run in its workdir, or checks what is there.

    `classes` are the names of what a classifier predicts.

    Raises:
      ConfigError: the workdir belongs to another configuration, or its data have changed.
    """
    file = epath.Path(workdir) / "config.json"
    mine = config.to_dict()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"config": mine, "data_digest": data_digest, "classes": list(classes)}
        storage.write_whole(file, json.dumps(facts, indent=1))
        return
    recorded = json.loads(file.read_text())
    # A field that is newer than the workdir has its default: what the run meant without it.
    standard, ours = (flat(json.loads(json.dumps(c))) for c in (default().to_dict(), mine))
    theirs = standard | flat(recorded["config"])
    changed = [
        f"config.{key}: {theirs.get(key, 'absent')!r} there, {ours.get(key, 'absent')!r} now"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not key.startswith(_FREE_TO_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"workdir {workdir} belongs to a run of another configuration ("
            + "; ".join(changed)
            + "); continue it with its own values, or give another --workdir"
        )
    if recorded["data_digest"] != data_digest:
        raise ConfigError(
            f"workdir {workdir} was trained on another version of the data: its store had digest "
            f"{recorded['data_digest'][:12]}, this one has {data_digest[:12]}; point "
            "config.data.dir at the old store, or give another --workdir"
        )


def _one_of(field: str, value: str, choices: Any) -> None:
    if value not in choices:
        hint = "".join(f"; did you mean {choice!r}?" for choice in _near(value, choices))
        raise ConfigError(f"config.{field} is {value!r}; known are {sorted(choices)}{hint}")


def _near(word: str, words: Iterable[str]) -> list[str]:
    """The one of `words` that a misspelt word may have meant, if any is near."""
    return difflib.get_close_matches(word, list(words), n=1)


def _get(config: ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a nested tree by their dotted names."""
    fields: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[prefix + key] = value
    return fields
