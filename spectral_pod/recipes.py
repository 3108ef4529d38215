"""Settings that several files in `configs/` share.

They are part of the package because a config file is loaded by its path, in any working folder, and
can import only what is installed.
"""

from spectral_pod.config import Config, default


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
    """Makes the model of `long_range` small enough for CPUs: 4 layers of width 64."""
    c.model.num_layers = 4
    c.model.hidden_dim = 64
    c.model.embed_dim = 64
    c.model.mlp_expansion = 2.0
    c.model.memory.head_dim = 32
    c.model.dropout = 0.0


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
