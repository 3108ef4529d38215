"""Bytes of the Python standard library's source, split by module: 12 MB, nothing to download.

    launch/local.sh --config=configs/lm_library.py --workdir=DIR
    python -m tools.generate --workdir=DIR --prompt="def main("

Or of any other source: `--config.data.options.source=FILE_OR_FOLDER`. The result is that of the
validation split, as a single file has no test split.

`:llm` trains SpectralLLM (wavelet attention, harmonic embeddings, frequency feed-forward) instead
of SpectralGPT.
"""

from spectral_pod.config import Config
from spectral_pod.recipes import small_language_model

MODELS = ("gpt", "llm")


def get_config(model: str = "gpt") -> Config:
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; there are {MODELS}")
    c = small_language_model()
    c.train.sample_prompt = "def "
    if model == "llm":
        c.model.name = "spectral_llm"
        c.model.memory_interval = 0
        c.model.channel_mixer = "frequency"
        c.model.consistency_weight = 0.1
    return c
