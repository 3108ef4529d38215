"""Settings that several files in `configs/` share.

They are part of the package because a config file is loaded by its path, in any working folder, and
can import only what is installed.
"""

import math
from collections.abc import Sequence
from typing import Literal

from spectral_pod.config import Config, default

# The mixers of the Transformers among the baselines of `configs/lra_*.py`, by preset.
TRANSFORMERS = {
    "transformer": "attention",
    "linear_transformer": "linear_attention",
    "linformer": "linformer",
    "fnet": "fnet",
}
BASELINES = (*TRANSFORMERS, "s5")  # beside the spectral model


def chosen(presets: str, *groups: Sequence[str]) -> list[str]:
    """The preset of every group of alternatives, for a list such as 'cpu,s5'.

    The first of a group is the one that holds if the list names none.

    Raises:
      ValueError: a name is unknown, or two of the same group are given.
    """
    found: dict[Sequence[str], str] = {}
    for name in presets.split(","):
        group = next((group for group in groups if name in group), None)
        if group is None:
            known = [name for group in groups for name in group]
            raise ValueError(f"unknown preset {name!r}; there are {known}, joined by commas")
        if found.setdefault(group, name) != name:
            raise ValueError(
                f"presets {found[group]!r} and {name!r} exclude each other; give one of "
                f"{list(group)}"
            )
    return [found.get(group, group[0]) for group in groups]


def schedule(c: Config, *, total: int, every: int, warmup: int | None = None) -> None:
    """Trains `total` steps, and validates and saves every `every` steps.

    `warmup` is by default `every`.
    """
    c.train.total_steps = total
    c.train.eval_every_steps = c.checkpoint.every_steps = every
    c.optimizer.warmup_steps = every if warmup is None else warmup


def learning_rates(c: Config, rate: float) -> None:
    """The same peak learning rate for both groups of parameters."""
    c.optimizer.learning_rate = c.optimizer.dynamics_learning_rate = rate


def long_range() -> Config:
    """A classifier of long sequences, 6 layers of width 256, for one accelerator or a slice."""
    c = default()
    c.model.num_layers = 6
    c.model.hidden_dim = 256
    c.model.memory_interval = 2
    c.model.dropout = 0.1
    c.model.unroll = 6  # all: a scan over layers copies what it stores for the backward pass
    c.train.global_batch_size = 64  # S5's is 50, which few meshes divide
    c.train.eval_batch_size = 128
    c.train.log_every_steps = 50
    c.optimizer.weight_decay = 0.05
    learning_rates(c, 1e-3)
    return c


def small_long_range(c: Config) -> None:
    """Makes the model of `long_range` small enough for CPUs: 4 layers of width 64 on patches."""
    patches(c)
    c.model.dtype = "float32"  # CPUs are faster in float32
    c.model.num_layers = 4
    c.model.hidden_dim = 64
    c.model.embed_dim = 64
    c.model.mlp_expansion = 2.0
    c.model.memory.head_dim = 32
    c.model.dropout = 0.0


def small_conversations(c: Config) -> None:
    """A SpectralGPT of 4 layers of width 128 that learns conversations on CPUs.

    Its second and fourth layers have attention, as calls and answers mostly copy: with delta
    memories in its place it learns that from more bytes (docs/results.md).
    """
    c.model.name = "spectral_gpt"
    c.model.pattern = ("hyena", "hyena+attention")
    c.model.num_layers = 4
    c.model.hidden_dim = 128
    c.model.positions = "none"
    c.train.global_batch_size = 16
    learning_rates(c, 3e-3)


def patches(c: Config, stride: int = 4) -> None:
    """Patches of several bytes for all models: on CPUs, single ones would take baselines hours."""
    c.model.patch.stride, c.model.patch.kernel = stride, 0


def transformer(
    c: Config,
    preset: str,
    *,
    layers: int,
    width: int,
    heads: int,
    hidden: int,
    dropout: float,
    batch: int,
    steps: int,
    warmup: int,
    rate: float,
    decay: float,
    pooling: Literal["attention", "mean"] = "attention",
    rank: int = 16,
) -> None:
    """Makes the model of `long_range` one of TRANSFORMERS, with a recipe of its baselines.

    The recipes are the files lra_benchmarks/TASK/configs of google-research/long-range-arena, whose
    default is a Linformer of rank 16. FNet is not among them and has those of the Transformer.

    What differs here: the channel mixer is gated, and two thirds as wide (to an eighth of the width
    of the model), which keeps the number of parameters; queries, keys and values are together as
    wide as the model; attention has no dropout of its own; Linformer combines keys and values
    differently; a learned query pools the positions in place of a CLS token; after warm-up the
    rate falls by a cosine, in place of the inverse square root of the step.

    Args:
      hidden: the width of the hidden layer that is not gated.
      rate: the highest learning rate.
      rank: of Linformer.
    """
    c.model.pattern = (TRANSFORMERS[preset],)
    c.model.patch.stride = c.model.patch.kernel = 1
    c.model.num_layers = c.model.unroll = layers
    c.model.hidden_dim = c.model.embed_dim = width
    c.model.mlp_expansion = round(8 * hidden / width * 2 / 3) / 8
    c.model.attention.num_heads = heads
    c.model.attention.rank = rank
    c.model.pooling = pooling
    c.model.dropout = dropout
    c.train.global_batch_size = batch
    schedule(c, total=steps, every=min(steps // 20, 2_500), warmup=warmup)
    learning_rates(c, rate)
    c.optimizer.weight_decay = decay
    c.optimizer.clip_norm = 0.0


def s5(
    c: Config,
    *,
    layers: int,
    width: int,
    state: int,
    blocks: int,
    c_init: str,
    dropout: float,
    records: int,
    batch: int,
    epochs: int,
    rate: float,
    dynamics_rate: float,
    decay: float,
    warmup_epochs: int = 1,
    dt_min: float = 0.001,
    dt_global: bool = False,
    glu: str = "half_glu1",
) -> None:
    """Makes the model of `long_range` S5, with a recipe of its authors.

    The recipes are the files bin/run_experiments/run_lra_TASK.sh of lindermanlab/S5. Batches are
    rounded up to a power of two, for the same number of epochs, and learning rates grow with the
    square root of the batch, as for Adam: ListOps' 50 records at 3e-3 become 64 at 3.39e-3.

    What differs here: B is trained as dynamics without weight decay, also where the recipe has
    `opt_config` BfastandCdecay (ListOps, Image) or BandCdecay (Path-X); biases are not decayed;
    bytes are embedded, also those that are pixels, and pass a layer with GELU and a norm before the
    blocks.

    Args:
      state: the number of real states, twice that of the complex ones.
      records: of the training split.
      rate, dynamics_rate: `lr_factor * ssm_lr_base` and `ssm_lr_base`.
    """
    c.model.pattern = ("s5",)
    c.model.channel_mixer = glu
    c.model.normalization = "batch"
    c.model.patch.stride = c.model.patch.kernel = 1
    c.model.patch.positions = "none"
    c.model.num_layers = c.model.unroll = layers
    c.model.hidden_dim = c.model.embed_dim = width
    c.model.s5.state_dim = state // 2
    c.model.s5.blocks = blocks
    c.model.s5.c_init = c_init
    c.model.s5.dt_min = dt_min
    c.model.s5.dt_global = dt_global
    c.model.pooling = "mean"
    c.model.dropout = dropout
    c.train.global_batch_size = 1 << math.ceil(math.log2(batch))
    epoch = records // c.train.global_batch_size  # steps
    schedule(c, total=epochs * epoch, every=epoch, warmup=max(1, warmup_epochs * epoch))
    scale = math.sqrt(c.train.global_batch_size / batch)
    c.optimizer.learning_rate = scale * rate
    c.optimizer.dynamics_learning_rate = scale * dynamics_rate
    c.optimizer.weight_decay = decay
    c.optimizer.b2 = 0.999
    c.optimizer.clip_norm = 0.0


def small_language_model() -> Config:
    """SpectralGPT of about 0.7M parameters on 256 bytes, for two CPU cores."""
    c = default()
    c.data.task = "lm"
    c.data.seq_len = 256
    c.model.name = "spectral_gpt"
    c.model.num_layers = 4
    c.model.hidden_dim = 128
    c.model.memory.num_heads = 2
    c.model.memory.head_dim = 32
    c.model.unroll = 4
    c.train.global_batch_size = 32
    c.train.eval_split = "validation"  # a single file has no other
    schedule(c, total=1500, every=250, warmup=100)
    learning_rates(c, 3e-3)
    c.optimizer.weight_decay = 0.1
    return c


def split_files(c: Config, pattern: str) -> None:
    """Reads a file for each split: `pattern` with 'train', 'valid' and 'test' in its braces."""
    names = {"train": "train", "validation": "valid", "test": "test"}
    c.data.options.update({split: pattern.format(name) for split, name in names.items()})
    c.train.eval_split = "test"


def gpu_language_model(c: Config) -> None:
    """Makes the model of `small_language_model` 15M parameters on 512 bytes, for a GPU."""
    c.data.seq_len = 512
    c.model.num_layers = 8
    c.model.hidden_dim = 384
    c.model.mlp_expansion = 2.0
    c.model.memory.num_heads = 6
    c.model.memory.head_dim = 64
    c.model.unroll = 4
    c.train.global_batch_size = 64
    c.train.total_steps = 3000
    learning_rates(c, 1e-3)
