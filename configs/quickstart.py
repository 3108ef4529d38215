"""The quickstart: what kind of file does this window of 2,048 bytes come from?

Real files of the interpreter's own installation, no download. A spectral model of 240
thousand parameters reads them byte by byte, on CPUs.

Command:  launch/local.sh
Cost:     about three minutes on two CPU cores
Expected: above 90% of the test windows, from files that training never saw
"""

from ml_collections import ConfigDict

from spectral_pod.config import default


def get_config() -> ConfigDict:
    c = default()
    c.data.task = "content_type"
    c.model.dtype = "float32"  # CPUs are faster in float32
    c.model.num_layers = 2
    c.model.hidden_dim = 64
    c.model.embed_dim = 64
    c.model.mlp_expansion = 2.0
    c.model.memory.head_dim = 32
    c.train.total_steps = 600
    c.train.global_batch_size = 16
    c.train.eval_every_steps = 200
    c.train.log_every_steps = 20
    c.checkpoint.every_steps = 200
    c.optimizer.learning_rate = 4e-3
    c.optimizer.dynamics_learning_rate = 4e-3
    c.optimizer.warmup_steps = 50
    return c
