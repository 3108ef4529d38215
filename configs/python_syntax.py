"""Python syntax: does a piece of source parse? From the standard library, nothing to download.

    launch/local.sh --config=configs/python_syntax.py --workdir=DIR

Half of the records are pieces of at most 128 bytes as they are, the others the same bytes with one
fragment in another place, so that they do not parse (`spectral_pod/data/tasks/python_syntax.py`).
Byte counts and lengths say nothing: `tools.baseline` is at 50%. Test pieces are of files that
training never saw. Longer pieces are harder:
`--config.data.options.window=512 --config.data.seq_len=512`; a model with patches of 4 bytes was at
50% on these after 600 steps.
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import learning_rates, long_range, schedule, small_long_range


def get_config() -> Config:
    c = long_range()
    small_long_range(c)
    c.data.task = "python_syntax"
    c.data.options = ConfigDict({"window": 128})
    c.data.seq_len = 128
    c.model.patch.stride = 1  # what is wrong is between two bytes
    c.model.num_layers = 2
    schedule(c, total=900, every=300, warmup=100)
    learning_rates(c, 3e-3)
    return c
