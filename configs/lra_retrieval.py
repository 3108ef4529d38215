"""Retrieval of the Long Range Arena: does one paper cite the other? Read byte by byte.

Command:  python -m spectral_pod.main --config=configs/lra_retrieval.py --workdir=DIR
              --config.data.options.source=lra_release/lra_release/tsv_data
          --config=configs/lra_retrieval.py:cpu      the substitute, for 2 CPU cores
          --config=configs/lra_retrieval.py:s5       a baseline: transformer, linear_transformer,
                                                     linformer, fnet or s5; `:cpu,s5` is small

The folder holds the published pairs of papers, new_aan_pairs.train.tsv, .eval.tsv and .test.tsv:
147,086, 18,090 and 17,437 of them. Without a source, a substitute for AAN is used: do two windows
of Python source, from the interpreter's own packages, come from the same file? Its sizes are the
options train, validation and test; `spectral_pod/data/tasks/retrieval.py` says what it measures.

The documents are encoded separately by the same model and then compared. The full preset is 6
layers of width 256 (about 5.3M parameters) on the first 4,000 bytes of each paper, 20 epochs, for
one accelerator or a slice.

The small one has one layer of width 128 on patches of 16 bytes. A comparison of byte histograms
classifies 68.6% of the test records, either document alone 50%: a model learns nothing before
it compares. With n-grams, and a comparison of what the documents of a batch do not share, it has
64.8% of them (docs/results.md); without both, models of windows of 1,024 bytes stayed at chance.
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import (
    BASELINES,
    TRANSFORMERS,
    chosen,
    learning_rates,
    long_range,
    patches,
    s5,
    schedule,
    transformer,
)

SIZES = ("full", "cpu")
MODELS = ("spectral", *BASELINES)


def get_config(presets: str = "full") -> Config:
    size, model = chosen(presets, SIZES, MODELS)
    c = long_range()
    c.data.task = "retrieval"
    c.data.options = ConfigDict(
        {
            "source": "",
            "literals": "decode",
            "window": 4000,
            "seed": 0,
            "train": 8_000,
            "validation": 1_000,
            "test": 1_000,
        }
    )
    c.data.documents = 2
    c.data.seq_len = 4000
    c.data.truncate = True

    c.train.global_batch_size = 32
    c.train.eval_batch_size = 64
    c.train.log_every_steps = 100
    schedule(c, total=92_000, every=4_600)  # 20 epochs of 147,086

    if model in TRANSFORMERS:  # base_match_config.py, whose warm-up of 8,000 steps does not end
        transformer(
            c, model, layers=4, width=128, heads=4, hidden=512, dropout=0.1, batch=32,
            steps=5_000, warmup=2_500, rate=0.05 / 8_000**0.5 * 5_000 / 8_000, decay=0.1,
        )  # fmt: skip
    if model == "s5":  # run_lra_aan.sh
        s5(
            c, layers=6, width=128, state=256, blocks=16, c_init="trunc_standard_normal",
            dropout=0.0, records=147_086, batch=32, epochs=20,
            rate=2e-3, dynamics_rate=1e-3, decay=0.05, dt_global=True,
        )  # fmt: skip

    if size == "cpu":
        patches(c, stride=16)
        c.data.options.update(train=20_000, validation=2_000, test=2_000)
        c.model.dtype = "float32"  # CPUs are faster in float32
        c.model.num_layers = 2
        c.model.hidden_dim = 64
        c.model.embed_dim = 64
        c.model.patch.ngrams = (3, 4, 5)
        c.model.pooling = "mean"
        c.model.comparison = "normalized"
        c.model.mlp_expansion = 2.0
        c.model.memory_interval = 0
        c.model.dropout = 0.0
        schedule(c, total=750, every=150, warmup=100)
        if model == "spectral":
            c.model.num_layers = 1
            c.model.hidden_dim = c.model.embed_dim = 128
            c.model.spectral.energy_gate = "none"
            c.model.spectral.initial = "smooth"
            c.optimizer.name = "muon"
            learning_rates(c, 2e-3)
    return c
