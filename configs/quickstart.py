"""The quickstart: what kind of file does this window of 2,048 bytes come from?

The files are those of the Python installation itself, so nothing is downloaded. A spectral model
with 240 thousand parameters reads them byte by byte, on CPUs.

Command:  launch/local.sh
Cost:     two to three minutes on two CPU cores
Expected: above 90% of the test windows, from files that training never saw
"""

from spectral_pod.config import Config, default
from spectral_pod.recipes import learning_rates, schedule


def get_config() -> Config:
    c = default()
    c.data.task = "content_type"
    c.model.dtype = "float32"  # CPUs are faster in float32
    c.model.num_layers = 2
    c.model.hidden_dim = 64
    c.model.embed_dim = 64
    c.model.mlp_expansion = 2.0
    c.model.memory.head_dim = 32
    c.train.global_batch_size = 16
    schedule(c, total=600, every=200, warmup=50)
    learning_rates(c, 4e-3)
    return c
