"""Pathfinder of the Long Range Arena: do two markers lie on the same dashed contour?

Command:  python -m spectral_pod.main --config=configs/lra_pathfinder.py --workdir=DIR
          --config=configs/lra_pathfinder.py:path_x    Path-X: 128 pixels a side, 16,384 bytes
          --config=configs/lra_pathfinder.py:cpu       contours of 3 paddles, for 2 CPU cores

The small preset is a trial of the pipeline: after its 1,200 steps the model is still at chance.
The full presets are for one accelerator or a slice. Their images are drawn first, once, by all
cores: 200,000 of 32 pixels at 300 a second and core, of 128 pixels at 15. With 3 paddles the
distance between the markers alone is worth 80 %; only what is above that follows contours.
"""

from ml_collections import ConfigDict

from spectral_pod.config import default

PRESETS = ("pathfinder", "path_x", "cpu")


def get_config(preset: str = "pathfinder") -> ConfigDict:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {list(PRESETS)}")
    c = default()
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

    c.model.num_layers = 6
    c.model.hidden_dim = 192
    c.model.embed_dim = 192
    c.model.memory_interval = 2
    c.model.pooling = "mean"
    c.model.remat = "full"

    c.train.total_steps = 100_000  # 40 epochs of 160,000
    c.train.global_batch_size = 64
    c.train.eval_batch_size = 100
    c.train.eval_every_steps = 2_500
    c.train.log_every_steps = 100
    c.checkpoint.every_steps = 2_500
    c.optimizer.learning_rate = 4e-3
    c.optimizer.dynamics_learning_rate = 1e-3
    c.optimizer.warmup_steps = 2_500
    c.optimizer.weight_decay = 0.05

    if preset == "cpu":
        c.data.options.update(contour_length=3, train=40_000, validation=1_000, test=2_000)
        c.model.num_layers = 4
        c.model.hidden_dim = 64
        c.model.embed_dim = 64
        c.model.mlp_expansion = 2.0
        c.model.memory.head_dim = 32
        c.model.remat = "none"
        c.train.total_steps = 1_200
        c.train.global_batch_size = 32
        c.train.eval_every_steps = 400
        c.checkpoint.every_steps = 400
        c.optimizer.warmup_steps = 100
    return c
