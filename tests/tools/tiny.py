"""A config for tests of the tools: a whole model, as small as one can be."""

from ml_collections import ConfigDict

from spectral_pod.config import default


def get_config() -> ConfigDict:
    c = default()
    c.data.task = "listops"
    c.data.seq_len = 128
    c.model.num_layers = 2
    c.model.hidden_dim = 32
    c.model.embed_dim = 16
    c.model.memory_interval = 0
    c.model.remat = "full"
    c.train.global_batch_size = 64
    c.train.eval_batch_size = 64
    return c
