"""Bytes of the Python standard library's source, split by module: 11.5 MB, nothing to download.

    launch/local.sh --config=configs/lm_library.py --workdir=DIR
    python -m tools.generate --workdir=DIR --prompt="def main("

`:llm` trains SpectralLLM (wavelet attention, harmonic embeddings) in the place of SpectralGPT.
"""

from ml_collections import ConfigDict

from configs import lm_shakespeare


def get_config(model: str = "gpt") -> ConfigDict:
    c = lm_shakespeare.get_config()
    c.model.dropout = 0.0
    c.train.eval_split = "test"
    c.train.sample_prompt = "def "
    if model == "llm":
        c.model.name = "spectral_llm"
        c.model.channel_mixer = "frequency"
        c.model.consistency_weight = 0.1
    return c
