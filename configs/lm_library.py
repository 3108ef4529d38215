"""Bytes of the Python standard library's source, split by module: 11.5 MB, nothing to download.

    launch/local.sh --config=configs/lm_library.py --workdir=DIR
    python -m tools.generate --workdir=DIR --prompt="def main("

`:llm` trains SpectralLLM (wavelet attention, harmonic embeddings, frequency feed-forward) in the
place of SpectralGPT.
"""

from ml_collections import ConfigDict

from spectral_pod.config import default

MODELS = ("gpt", "llm")


def get_config(model: str = "gpt") -> ConfigDict:
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; there are {MODELS}")
    c = default()
    c.data.task = "lm"
    c.data.seq_len = 256
    c.model.name = "spectral_gpt"
    c.model.num_layers = 4
    c.model.hidden_dim = 128
    c.model.memory.num_heads = 2
    c.model.memory.head_dim = 32
    c.model.unroll = 4
    c.train.global_batch_size = 32
    c.train.total_steps = 1500
    c.train.eval_every_steps = 250
    c.train.sample_prompt = "def "
    c.checkpoint.every_steps = 250
    c.optimizer.learning_rate = c.optimizer.dynamics_learning_rate = 3e-3
    c.optimizer.weight_decay = 0.1
    if model == "llm":
        c.model.name = "spectral_llm"
        c.model.memory_interval = 0
        c.model.channel_mixer = "frequency"
        c.model.consistency_weight = 0.1
    return c
