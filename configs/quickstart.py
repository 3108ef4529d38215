"""The quickstart: what kind of file is this window of 2,048 bytes?

Real files of the interpreter's own installation, no download.

Command:  launch/local.sh
"""

from ml_collections import ConfigDict

from spectral_pod.config import default


def get_config() -> ConfigDict:
    c = default()
    c.data.task = "content_type"
    c.model.dtype = "float32"  # CPUs are faster in float32
    c.model.num_layers = 4
    c.model.hidden_dim = 128
    c.model.embed_dim = 64
    c.train.total_steps = 500
    c.train.global_batch_size = 16
    c.train.eval_every_steps = 250
    c.train.log_every_steps = 10
    c.checkpoint.every_steps = 250
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 50
    return c
