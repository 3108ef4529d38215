"""Image of the Long Range Arena: the class of a gray picture of 32 x 32, read pixel by pixel.

Command:  python -m spectral_pod.main --config=configs/lra_image.py --workdir=DIR
          --config=configs/lra_image.py:cpu     a preset for 8 minutes on 2 cores
          --config=configs/lra_image.py:s5      a baseline: transformer, linear_transformer,
                                                linformer, fnet or s5; `:cpu,s5` is its small one

The pictures are those of CIFAR-10, which TensorFlow Datasets downloads: the luma of their colors,
1,024 bytes row by row; 45,000 for training, 5,000 for validation and 10,000 for testing. To use
your own arrays of gray bytes, `pixels`, and `label`, 0 to 9:

    --config.data.options.train=train.npz --config.data.options.validation=
    --config.data.options.test=test.npz --config.data.options.data=pixels
    --config.data.options.luma=False

A tenth of the training pictures, chosen by a hash of their bytes, is then the validation split.

The full preset is 6 layers of width 256 (about 2.7M parameters), 100 epochs, for one accelerator or
a slice; the small one is one epoch.
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

SIZES = ("full", "cpu")
MODELS = ("spectral", *BASELINES)
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip


def get_config(presets: str = "full") -> Config:
    size, model = chosen(presets, SIZES, MODELS)
    c = long_range()
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
    schedule(c, total=70_300, every=703)  # 100 epochs of 45,000

    if model in TRANSFORMERS:  # cifar10/transformer_base.py, and so are the others
        transformer(
            c, model, layers=1, width=128, heads=8, hidden=128, dropout=0.3,
            batch=256, steps=35_000, warmup=175, rate=5e-4, decay=0.0,
        )  # fmt: skip
    if model == "s5":  # run_lra_cifar.sh
        s5(
            c, layers=6, width=512, state=384, blocks=3, c_init="lecun_normal", dropout=0.1,
            records=45_000, batch=50, epochs=250, rate=4.5e-3, dynamics_rate=1e-3, decay=0.07,
        )  # fmt: skip

    if size == "cpu":
        small_long_range(c)
        c.train.global_batch_size = 64
        schedule(c, total=700, every=350, warmup=70)  # an epoch
        if model == "spectral":
            c.optimizer.learning_rate = 3e-3
    return c
