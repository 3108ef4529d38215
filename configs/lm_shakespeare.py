"""Byte language model of tiny Shakespeare, nanoGPT's split: the last tenth is held out.

    launch/local.sh --config=configs/lm_shakespeare.py --workdir=DIR \
        --config.data.options.source=FILE
"""

from ml_collections import ConfigDict

from spectral_pod.config import default


def get_config() -> ConfigDict:
    c = default()
    c.data.task = "lm"
    c.data.options.source = ""
    c.data.seq_len = 256
    c.model.name = "spectral_gpt"
    c.model.num_layers = 4
    c.model.hidden_dim = 128
    c.model.memory.head_dim = 32
    c.model.memory.num_heads = 2
    c.model.unroll = 4
    c.train.global_batch_size = 32
    c.train.eval_batch_size = 32
    c.train.total_steps = 3000
    c.train.eval_every_steps = 250
    c.train.eval_split = "validation"
    c.checkpoint.every_steps = 250
    c.optimizer.learning_rate = 3e-3
    c.optimizer.dynamics_learning_rate = 3e-3
    c.optimizer.weight_decay = 0.1
    return c
