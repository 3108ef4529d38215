"""Text of the Long Range Arena: is a movie review, read byte by byte, positive or negative?

Command:  python -m spectral_pod.main --config=configs/lra_text.py --workdir=DIR
          --config=configs/lra_text.py:cpu      a preset for 30 minutes on 2 cores

The reviews are IMDb's (25,000 to train on, 25,000 to test), from TensorFlow Datasets, which
downloads them. Files of your own, of any format that `spectral_pod/data/formats.py` reads:

    --config.data.options.train=train.jsonl.xz --config.data.options.test=test.jsonl.xz

with the fields `text` and `label` (neg or pos, 0 or 1); other fields and classes are named by
`--config.data.options.data`, `.label` and `.classes`. A tenth of the training reviews, by a hash of
their bytes, is the validation split.

The full preset is 6 layers of width 256 (about 2.5M parameters), 32 epochs of reviews cut after
4,096 bytes, for one accelerator or a slice. The small one, 349k parameters, reads the first 1,024
bytes in 6 epochs, and gets 75.5% of half the test reviews after 3,300 steps (26 CPU minutes), 75.8%
at its end (docs/results.md).
"""

from ml_collections import ConfigDict

from spectral_pod.config import default

PRESETS = ("full", "cpu")


def get_config(preset: str = "full") -> ConfigDict:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {PRESETS}")
    c = default()
    c.data.task = "records"
    c.data.options = ConfigDict(
        {
            "train": "tfds:imdb_reviews/train",
            "validation": "",
            "test": "tfds:imdb_reviews/test",
            "data": "text",
            "label": "label",
            "classes": ("neg", "pos"),
            "format": "auto",
            "on_fault": "stop",
            "seed": 0,
        }
    )
    c.data.seq_len = 4096
    c.data.truncate = True

    c.model.num_layers = 6
    c.model.hidden_dim = 256
    c.model.memory_interval = 2
    c.model.dropout = 0.1
    c.model.remat = "full"

    c.train.total_steps = 14_400  # 32 epochs of 22,500
    c.train.global_batch_size = 50
    c.train.eval_batch_size = 100
    c.train.eval_every_steps = 450
    c.train.log_every_steps = 50
    c.checkpoint.every_steps = 450
    c.optimizer.learning_rate = 1e-3
    c.optimizer.dynamics_learning_rate = 1e-3
    c.optimizer.warmup_steps = 450
    c.optimizer.weight_decay = 0.05

    if preset == "cpu":
        c.data.seq_len = 1024
        c.model.num_layers = 2
        c.model.unroll = 2
        c.model.hidden_dim = 128
        c.model.embed_dim = 64
        c.model.remat = "none"
        c.train.total_steps = 4_400  # 6 epochs
        c.train.global_batch_size = 32
        c.train.eval_every_steps = 1_100
        c.checkpoint.every_steps = 1_100
        c.optimizer.learning_rate = 3e-3
        c.optimizer.warmup_steps = 140
    return c
