"""Text of the Long Range Arena: is a movie review, read byte by byte, positive or negative?

Command:  python -m spectral_pod.main --config=configs/lra_text.py --workdir=DIR
          --config=configs/lra_text.py:cpu      a preset for 35 minutes on one core
          --config=configs/lra_text.py:s5       a baseline: transformer, linear_transformer,
                                                linformer, fnet or s5; `:cpu,s5` is its small one

The reviews are those of IMDb (25,000 for training, 25,000 for testing), which TensorFlow Datasets
downloads. To use your own files, in any format that `spectral_pod/data/formats.py` reads:

    --config.data.options.train=train.jsonl.xz --config.data.options.test=test.jsonl.xz

with the fields `text` and `label` (neg or pos, 0 or 1); other fields and classes are named by
`--config.data.options.data`, `.label` and `.classes`. A tenth of the training reviews, chosen by a
hash of their bytes, is the validation split.

The full preset is 6 layers of width 256 (about 5.1M parameters), 32 epochs of reviews truncated to
4,096 bytes, for one accelerator or a slice. The small one reads the first 1,024 bytes, with a table
of hashed n-grams that has 8.4M of its 8.7M parameters. After one of its two epochs it was at 84.6%
on half of the test reviews (docs/results.md).
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import (
    BASELINES,
    TRANSFORMERS,
    chosen,
    long_range,
    patches,
    s5,
    schedule,
    transformer,
)

SIZES = ("full", "cpu")
MODELS = ("spectral", *BASELINES)


def get_config(presets: str = "full") -> Config:
    size, model = chosen(presets, SIZES, MODELS)
    c = long_range()
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
    schedule(c, total=11_250, every=375)  # 32 epochs of 22,500

    if model in TRANSFORMERS:  # base_tc_config.py, linformer_base.py
        transformer(
            c, model, layers=4, width=256, heads=4, hidden=1024, dropout=0.1, rank=32,
            batch=32, steps=20_000, warmup=8_000, rate=0.05 / 8_000**0.5, decay=0.1,
        )  # fmt: skip
    if model == "s5":  # run_lra_imdb.sh, which trains on 25,000 and chooses by the test split
        s5(
            c, layers=6, width=256, state=192, blocks=12, c_init="lecun_normal", dropout=0.1,
            glu="half_glu2", records=22_500, batch=50, epochs=35, warmup_epochs=0,
            rate=4e-3, dynamics_rate=1e-3, decay=0.07, dt_global=True,
        )  # fmt: skip

    if size == "cpu":
        patches(c)
        c.data.seq_len = 1024
        c.model.num_layers = 2
        c.model.hidden_dim = 128
        c.model.embed_dim = 64
        c.train.global_batch_size = 32
        c.model.patch.ngrams = (3, 4, 5, 6)
        schedule(c, total=1_400, every=350, warmup=100)  # 2 epochs
        if model == "spectral":
            c.optimizer.learning_rate = 3e-3
    return c
