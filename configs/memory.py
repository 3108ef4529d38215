"""Small tests of memory that a CPU learns in minutes: `:copy`, `:recall`, `:overwrite`.

copy: repeat a string of random bytes. recall: "a=10, b=20. What is a?". overwrite: the same, where
some names are assigned again and the last value counts.

    launch/local.sh --config=configs/memory.py:recall --workdir=DIR

Without a memory: `--config.model.memory_interval=0`.
"""

from spectral_pod.config import Config, default
from spectral_pod.recipes import learning_rates, schedule

SEQ_LEN = {"copy": 64, "recall": 112, "overwrite": 136}


def get_config(task: str = "recall") -> Config:
    if task not in SEQ_LEN:
        raise ValueError(f"unknown task {task!r}; there are {list(SEQ_LEN)}")
    c = default()
    c.data.task = task
    c.data.seq_len = SEQ_LEN[task]
    c.model.name = "spectral_gpt"
    c.model.num_layers = 2
    c.model.hidden_dim = 64
    c.model.memory.head_dim = 64
    c.model.memory.short_conv = 3
    c.model.positions = "none"
    c.train.global_batch_size = 64
    schedule(c, total=2000, every=500, warmup=100)
    learning_rates(c, 3e-3)
    return c
