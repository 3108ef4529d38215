"""A config for the tests of tools.sanity: each model, as small as it can be and still learn.

`--config=tests/tools/sound.py:spectral_gpt`, and so on.
"""

import pathlib

from ml_collections import ConfigDict

from spectral_pod.config import default
from spectral_pod.recipes import learning_rates

ROOT = pathlib.Path(__file__).parents[2]


def get_config(model: str = "spectral_model") -> ConfigDict:
    c = default()
    c.model.name = model
    c.model.dtype = "float32"
    c.model.num_layers = 2
    c.model.hidden_dim = 16
    c.model.embed_dim = 16
    c.model.memory.num_heads = 2
    c.model.memory.head_dim = 8
    c.model.wavelet.num_heads = 2
    c.model.wavelet.levels = 2
    c.train.eval_batch_size = 32
    if model == "spectral_model":
        # An expression begins with its operator, which alone predicts much.
        c.data.task = "listops"
        c.data.options = ConfigDict({"train": 1000, "validation": 256, "test": 1, "num_workers": 1})
        c.data.seq_len = 64
        c.data.truncate = True
        c.train.global_batch_size = 32
    else:
        c.data.task = "lm"
        c.data.options = ConfigDict({"source": str(ROOT / "docs" / "results.md")})
        c.data.seq_len = 64
        c.model.consistency_weight = 0.1 if model == "spectral_llm" else 0.0
        c.train.global_batch_size = 16
    learning_rates(c, 2e-2)
    return c
