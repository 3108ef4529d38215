"""enwik8, the first 100 MB of a dump of Wikipedia, or any such file, as bytes.

    head -c 90000000 enwik8 > enwik8.train
    tail -c +90000001 enwik8 | head -c 5000000 > enwik8.valid
    tail -c 5000000 enwik8 > enwik8.test
    launch/local.sh --config=configs/lm_enwik8.py --workdir=DIR

These are the defaults of `--config.data.options.train`, `.validation` and `.test`, and the usual
split (the file is in mattmahoney.net/dc/enwik8.zip). Evaluations report bits per byte. Published,
on the test part: 1.11 with 44M parameters (Al-Rfou et al. 2019, 12 layers), 1.06, 1.03 and 0.99
with 41M, 88M and 277M (Dai et al. 2019, "Transformer-XL"), 1.02 with 39M (Ma et al. 2022, "Mega").
These models see bytes before the window that is evaluated; here each window of `data.seq_len` bytes
starts without any, which costs a little.

`:cpu` (the default) trains SpectralGPT with 0.7M parameters on two CPU cores; `:gpu` one of 40M on
windows of 2,048 bytes, 20 epochs, for a GPU or a slice. Neither has been trained on enwik8 yet.
"""

from spectral_pod.config import Config
from spectral_pod.recipes import (
    gpu_language_model,
    learning_rates,
    schedule,
    small_language_model,
    split_files,
)

SIZES = ("cpu", "gpu")


def get_config(size: str = "cpu") -> Config:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {SIZES}")
    c = small_language_model()
    split_files(c, "enwik8.{}")
    c.train.sample_prompt = "    <title>"
    if size == "gpu":
        gpu_language_model(c)
        c.data.seq_len = 2048
        c.model.num_layers = c.model.unroll = 12
        c.model.hidden_dim = c.model.embed_dim = 512
        c.model.memory.num_heads = 8
        c.model.hyena.filter = "implicit"
        c.model.dropout = 0.1
        schedule(c, total=28_000, every=1_400, warmup=1_400)  # 64 windows a step
        learning_rates(c, 6e-4)
    return c
