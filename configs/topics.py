"""Topics: which subject is a text about? From labelled texts, such as AG News.

    launch/local.sh --config=configs/topics.py --workdir=DIR     # TFDS downloads AG News
    launch/local.sh --config=configs/topics.py --workdir=DIR \\
        --config.data.options.train=train.parquet --config.data.options.test=test.parquet \\
        --config.data.options.data=text

The default is `ag_news_subset` of TensorFlow Datasets: 120,000 descriptions of news for training
and 7,600 for testing, of 4 topics. Your own files may be parquet, CSV, JSON lines and others
(`spectral_pod/data/formats.py`), with the topic in the field `label`, or the one that
`--config.data.options.label` names. AG's own CSV files have no header:
`--config.data.options.columns="('label', 'title', 'text')"`. A tenth of the training records, by a
hash of their bytes, is for validation. The first 512 bytes of a text are read, with a table of
hashed n-grams, as in `configs/lra_text.py`. Of AG's 7,600 texts for testing, a tenth held out, it
has 80.4% after 400 steps (docs/results.md); on the whole of AG News it has not been trained.
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import learning_rates, long_range, schedule, small_long_range

SIZES = ("cpu", "full")


def get_config(size: str = "cpu") -> Config:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {SIZES}")
    c = long_range()
    c.data.task = "records"
    c.data.options = ConfigDict(
        {
            "train": "tfds:ag_news_subset/train",
            "validation": "",
            "test": "tfds:ag_news_subset/test",
            "data": "description",
            "label": "label",
            "columns": (),
            "on_fault": "stop",
        }
    )
    c.data.seq_len = 512
    c.data.truncate = True
    schedule(c, total=20_000, every=1_000)
    if size == "cpu":
        small_long_range(c)
        c.model.patch.ngrams = (3, 4, 5)
        c.model.num_layers = 2
        schedule(c, total=1_700, every=340, warmup=100)  # an epoch
        learning_rates(c, 3e-3)
    return c
