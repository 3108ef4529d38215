"""Tiny Shakespeare as bytes, with nanoGPT's split: the last tenth of the file is for validation.

    launch/local.sh --config=configs/lm_shakespeare.py --workdir=DIR \\
        --config.data.options.source=tiny_shakespeare.txt

`:cpu` (the default) trains SpectralGPT with 0.7M parameters on two CPU cores in some ten minutes
to less than 1.6 nats a byte (nanoGPT's CPU recipe: 1.88); `:gpu` one of nanoGPT's size on a GPU
(nanoGPT: 1.4697). The source can be any text or binary file or folder; by default it is the Python
standard library.
"""

from spectral_pod.config import Config
from spectral_pod.recipes import learning_rates, small_language_model

SIZES = ("cpu", "gpu")


def get_config(size: str = "cpu") -> Config:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {SIZES}")
    c = small_language_model()
    c.data.options.source = ""
    c.model.dropout = 0.1
    if size == "gpu":
        c.data.seq_len = 512
        c.model.num_layers = 8
        c.model.hidden_dim = 384
        c.model.mlp_expansion = 2.0
        c.model.memory.num_heads = 6
        c.model.memory.head_dim = 64
        c.model.dropout = 0.2
        c.model.unroll = 1
        c.train.global_batch_size = 64
        c.train.total_steps = 3000
        learning_rates(c, 1e-3)
    return c
