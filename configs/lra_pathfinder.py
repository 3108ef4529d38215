"""Pathfinder of the Long Range Arena: do two markers lie on the same dashed contour?

Command:  python -m spectral_pod.main --config=configs/lra_pathfinder.py --workdir=DIR
          --config=configs/lra_pathfinder.py:path_x    Path-X: 128 pixels a side, 16,384 bytes
          --config=configs/lra_pathfinder.py:cpu       contours of 3 paddles, for 2 CPU cores

The small preset only exercises the pipeline: after its 1,200 steps the model is still at chance.
The full presets are for one accelerator or a slice. Their 200,000 images are generated first, once,
on all cores: 300 a second and core of 32 pixels, 15 of 128 pixels. With 3 paddles the distance
between the markers alone gives 80%; only accuracy above that comes from following contours.
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import long_range, schedule, small_long_range

PRESETS = ("pathfinder", "path_x", "cpu")


def get_config(preset: str = "pathfinder") -> Config:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {list(PRESETS)}")
    c = long_range()
    c.data.task = "pathfinder"
    c.data.options = ConfigDict(
        {
            "size": 128 if preset == "path_x" else 32,
            "contour_length": 14,
            "seed": 0,
            "train": 160_000,
            "validation": 20_000,
            "test": 20_000,
        }
    )
    c.data.seq_len = c.data.options.size**2

    c.model.hidden_dim = 192
    c.model.embed_dim = 192
    c.model.pooling = "mean"
    c.model.dropout = 0.0

    c.train.log_every_steps = 100
    schedule(c, total=100_000, every=2_500)  # 40 epochs of 160,000
    c.optimizer.learning_rate = 4e-3

    if preset == "cpu":
        c.data.options.update(contour_length=3, train=40_000, validation=1_000, test=2_000)
        small_long_range(c)
        c.train.global_batch_size = 32
        schedule(c, total=1_200, every=400, warmup=100)
    return c
