"""Multi-query associative recall, as in Zoology (Arora et al. 2023).

A sequence lists keys with their values and then repeats keys, each after a gap; the value predicted
at the repeated key is scored.

    launch/local.sh --config=configs/mqar.py --workdir=DIR

The default is Zoology's: 8,192 symbols, sequences of 64 to 256 with 4 to 64 pairs. `:bytes`, with
the 256 bytes as symbols, can be learned on a CPU in minutes. Other mixers:
`--config.model.pattern="('hyena', 'hyena')"`. Longer tests of a trained model (TEST_SETTINGS in
`data/tasks/mqar.py`):

    python -m spectral_pod.main --config=configs/mqar.py --workdir=DIR --eval_only \\
        --config.data.seq_len=1024 --config.data.options.settings="((1024, 256),)"
"""

from spectral_pod.config import Config, default
from spectral_pod.data.tasks.mqar import TRAIN_SETTINGS
from spectral_pod.recipes import learning_rates, schedule

SIZES = ("zoology", "bytes")


def get_config(size: str = "zoology") -> Config:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {SIZES}")
    c = default()
    c.data.task = "mqar"
    c.data.options.settings = TRAIN_SETTINGS
    c.data.options.vocab_size = 8192
    c.data.options.random_non_queries = True
    c.data.seq_len = 256
    c.model.name = "spectral_gpt"
    c.model.pattern = ("hyena", "hyena+delta")
    c.model.num_layers = 2
    c.model.hidden_dim = 128
    c.model.memory.num_heads = 2
    c.model.memory.head_dim = 64
    c.model.memory.short_conv = 3
    c.model.positions = "none"
    c.model.context = 1024
    c.train.global_batch_size = 256
    c.train.eval_records = 3000
    schedule(c, total=25_000, every=1000, warmup=100)
    c.optimizer.weight_decay = 0.1
    if size == "bytes":
        c.model.hidden_dim = 64
        c.model.memory.num_heads = 1
        c.data.seq_len = c.model.context = 64
        c.data.options.settings = ((64, 4), (64, 8), (64, 16))
        c.train.global_batch_size = 64
        c.train.total_steps = 1500
        c.train.eval_every_steps = 250
        c.train.eval_records = 1000
        learning_rates(c, 3e-3)
        c.data.options.vocab_size = 256
        c.data.options.random_non_queries = False  # one of 256 symbols would often be a key
    return c
