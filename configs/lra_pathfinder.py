"""Pathfinder of the Long Range Arena: do two markers lie on the same dashed contour?

Command:  python -m spectral_pod.main --config=configs/lra_pathfinder.py --workdir=DIR
          --config=configs/lra_pathfinder.py:path_x    Path-X: 128 pixels a side, 16,384 bytes
          --config=configs/lra_pathfinder.py:hybrid    attention in every second block
          --config=configs/lra_pathfinder.py:cpu       contours of 3 paddles, for 2 CPU cores
          --config=configs/lra_pathfinder.py:s5        a baseline: transformer, linear_transformer,
                                                       linformer, fnet or s5

Presets combine, one of each kind: `:path_x,s5`, `:cpu,fnet`.

With attention the small preset, `:cpu,hybrid`, learns within 17 minutes of one core: 85.1% of the
test images (docs/results.md). Its contours have 3 paddles, where the distance between the markers
alone gives 80%; only accuracy above that comes from following contours. The full presets
are for one accelerator or a slice. Their 200,000 images are generated first, once, on all cores:
300 a second and core of 32 pixels, 15 of 128 pixels.
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import (
    BASELINES,
    TRANSFORMERS,
    chosen,
    long_range,
    s5,
    schedule,
    small_long_range,
    transformer,
)

TASKS = ("pathfinder", "path_x")
SIZES = ("full", "cpu")
MODELS = ("spectral", "hybrid", *BASELINES)
# Layers, width and heads.
SHAPES = {"transformer": (4, 32, 4), "linear_transformer": (1, 128, 2), "linformer": (1, 32, 2)}


def get_config(presets: str = "pathfinder") -> Config:
    task, size, model = chosen(presets, TASKS, SIZES, MODELS)
    c = long_range()
    c.data.task = "pathfinder"
    c.data.options = ConfigDict(
        {
            "size": 128 if task == "path_x" else 32,
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

    if model == "hybrid":
        c.model.pattern = ("spectral", "spectral+attention")
    if model in TRANSFORMERS and task == "pathfinder":  # pathfinder32/MODEL_base.py
        layers, width, heads = SHAPES.get(model, SHAPES["transformer"])
        transformer(
            c, model, layers=layers, width=width, heads=heads, hidden=width, dropout=0.2,
            pooling="mean", batch=512, steps=62_400, warmup=312, rate=1e-3, decay=0.0,
        )  # fmt: skip
    if model in TRANSFORMERS and task == "path_x":  # base_pathfinder128_config.py
        transformer(
            c, model, layers=1, width=32, heads=2, hidden=32, dropout=0.1, pooling="mean",
            batch=64, steps=500_000, warmup=2_500, rate=1e-3, decay=0.0,
        )  # fmt: skip
        c.optimizer.clip_norm = 1.0
    if model == "s5" and task == "pathfinder":  # run_lra_pathfinder.sh
        s5(
            c, layers=6, width=192, state=256, blocks=8, c_init="trunc_standard_normal",
            dropout=0.05, records=160_000, batch=64, epochs=200,
            rate=4.5e-3, dynamics_rate=0.9e-3, decay=0.03,
        )  # fmt: skip
    if model == "s5" and task == "path_x":  # run_lra_pathx.sh
        s5(
            c, layers=6, width=128, state=256, blocks=16, c_init="complex_normal", dropout=0.0,
            records=160_000, batch=32, epochs=75, dt_min=0.0001,
            rate=1.8e-3, dynamics_rate=0.6e-3, decay=0.06,
        )  # fmt: skip

    if size == "cpu":
        c.data.options.update(contour_length=3, train=40_000, validation=1_000, test=2_000)
        small_long_range(c)
        c.train.global_batch_size = 32
        schedule(c, total=2_000, every=500, warmup=100)
        if model in ("spectral", "hybrid"):
            c.model.memory_interval = 0
            c.model.spectral.initial = "smooth"
            c.model.spectral.tau_min = 0.5
            c.model.spectral.energy_gate = "none"
            c.optimizer.name = "muon"
            c.optimizer.learning_rate = 3e-3
    return c
