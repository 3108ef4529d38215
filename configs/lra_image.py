"""Image of the Long Range Arena: what a gray picture of 32 x 32 shows, read pixel by pixel.

Command:  python -m spectral_pod.main --config=configs/lra_image.py --workdir=DIR
          --config=configs/lra_image.py:cpu     a preset for 8 minutes on 2 cores

The pictures are CIFAR-10's from TensorFlow Datasets, which downloads them: the luma of their
colors, 1,024 bytes in rows; 45,000 to train on, 5,000 for validation and 10,000 to test. From
arrays of your own that hold gray bytes `pixels` and `label`, 0 to 9:

    --config.data.options.train=train.npz --config.data.options.validation=
    --config.data.options.test=test.npz --config.data.options.data=pixels
    --config.data.options.luma=False

where a tenth of the training pictures, by a hash of their bytes, is the validation split.

The full preset is 6 layers of width 256 (about 2.5M parameters), 100 epochs, for one accelerator or
a slice; the small one is one epoch.
"""

from ml_collections import ConfigDict

from spectral_pod.config import default

PRESETS = ("full", "cpu")
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip


def get_config(preset: str = "full") -> ConfigDict:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {PRESETS}")
    c = default()
    c.data.task = "records"
    c.data.options = ConfigDict(
        {
            "train": "tfds:cifar10/train[:90%]",
            "validation": "tfds:cifar10/train[90%:]",
            "test": "tfds:cifar10/test",
            "data": "image",
            "label": "label",
            "classes": CLASSES,
            "luma": True,
            "seed": 0,
        }
    )
    c.data.seq_len = 1024

    c.model.num_layers = 6
    c.model.hidden_dim = 256
    c.model.memory_interval = 2
    c.model.dropout = 0.1
    c.model.remat = "full"

    c.train.total_steps = 90_000  # 100 epochs of 45,000
    c.train.global_batch_size = 50
    c.train.eval_batch_size = 100
    c.train.eval_every_steps = 900
    c.train.log_every_steps = 50
    c.checkpoint.every_steps = 900
    c.optimizer.learning_rate = 1e-3
    c.optimizer.dynamics_learning_rate = 1e-3
    c.optimizer.warmup_steps = 900
    c.optimizer.weight_decay = 0.05

    if preset == "cpu":
        c.model.num_layers = 4
        c.model.hidden_dim = 64
        c.model.embed_dim = 64
        c.model.mlp_expansion = 2.0
        c.model.memory.head_dim = 32
        c.model.dropout = 0.0
        c.model.remat = "none"
        c.train.total_steps = 700  # an epoch
        c.train.global_batch_size = 64
        c.train.eval_every_steps = 350
        c.checkpoint.every_steps = 350
        c.optimizer.learning_rate = 3e-3
        c.optimizer.warmup_steps = 70
    return c
