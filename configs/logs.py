"""Log lines: blocks in which something is wrong, or lines and blocks of your own with labels.

    launch/local.sh --config=configs/logs.py --workdir=DIR
    launch/local.sh --config=configs/logs.py:lines --workdir=DIR \\
        --config.data.options.train='logs/*.csv'

`:blocks` (the default) generates blocks of interleaved sessions; in half of them two lines have
exchanged their texts or sessions, so that a session does not go through its steps in order
(`spectral_pod/data/tasks/log_blocks.py`). Layouts with services that are in test blocks are in no
other. Byte counts and lengths say nothing: `tools.baseline` is at 50%. Generated logs say nothing
about real systems.

`:lines` reads real logs with labels: by default the columns `Content` and `Level` of the structured
files of Loghub (logpai/loghub, such as `Linux_2k.log_structured.csv`), whose level is not in the
content; `--config.data.options.label=Component` predicts the component. Any other format and field
is named as in `configs/lra_text.py`; blocks, such as those of HDFS by block, are records whose text
has several lines. A tenth of the lines, by a hash of their bytes, is for validation and another for
testing: lines of one template are in several splits then, so name files of other days or machines
with `--config.data.options.test`. Copies of a line are all in one split, and may be most of it. On
five of Loghub's files, each line once, it has 99.7%, as have byte histograms (docs/results.md).
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import learning_rates, long_range, schedule, small_long_range

FORMS = ("blocks", "lines")


def get_config(form: str = "blocks") -> Config:
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; there are {FORMS}")
    c = long_range()
    small_long_range(c)
    c.model.patch.stride = 1
    c.model.num_layers = 2
    schedule(c, total=900, every=300, warmup=100)
    learning_rates(c, 3e-3)
    if form == "blocks":
        c.data.task = "log_blocks"
        c.data.options = ConfigDict({"window": 640})
        c.data.seq_len = 640
        c.model.patch.stride = 4
    else:
        c.data.task = "records"
        c.data.options = ConfigDict(
            {"train": "logs/*.csv", "test": "", "data": "Content", "label": "Level"}
        )
        c.data.seq_len = 256
        c.data.truncate = True
    return c
