"""Tiny Shakespeare as bytes, with nanoGPT's split: the last tenth of the file is for validation.

    launch/local.sh --config=configs/lm_shakespeare.py --workdir=DIR \\
        --config.data.options.source=tiny_shakespeare.txt

`:cpu` (the default) trains SpectralGPT with 0.7M parameters on two CPU cores in some ten minutes
to less than 1.6 nats a byte (nanoGPT's CPU recipe: 1.88); `:gpu` one of nanoGPT's size on a GPU
(nanoGPT: 1.4697). The source can be anything that `spectral_pod/data/tasks/lm.py` reads, such as a
folder, a binary file or `reviews.jsonl.gz`; by default it is the Python standard library.
"""

from spectral_pod.config import Config
from spectral_pod.recipes import gpu_language_model, small_language_model

SIZES = ("cpu", "gpu")


def get_config(size: str = "cpu") -> Config:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {SIZES}")
    c = small_language_model()
    c.data.options.source = ""
    c.model.dropout = 0.1
    if size == "gpu":
        gpu_language_model(c)
        c.model.dropout = 0.2
    return c
