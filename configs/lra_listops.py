"""ListOps of the Long Range Arena: the value of a nested expression, 0 to 9.

Command:  python -m spectral_pod.main --config=configs/lra_listops.py --workdir=DIR
          --config=configs/lra_listops.py:stripped or :raw    the other encodings
          --config=configs/lra_listops.py:hybrid              attention in every second block
          --config=configs/lra_listops.py:multi_scale         with pooled views of 4, 16 patches
          --config=configs/lra_listops.py:cpu                 a preset for 15 minutes on 2 cores
          --config=configs/lra_listops.py:gpu,hybrid,packed   seven minutes of one H100
          --config=configs/lra_listops.py:overfit             memorises 100 examples in 500 steps
          --config=configs/lra_listops.py:short               expressions of 21 to 95 symbols
          --config=configs/lra_listops.py:short,packed        and rows of shorter ones to train on
          --config=configs/lra_listops.py:short,subtrees      the same, with the value of every
                                                operator as a label
          --config=configs/lra_listops.py:short,hybrid,arguments   also with those over the
                                                arguments up to each: an hour of two cores
          --config=configs/lra_listops.py:s5                  a baseline: transformer,
                                                linear_transformer, linformer, fnet or s5

Presets combine, one of each kind: `:cpu,s5`, `:raw,transformer`.

The full preset is 6 layers of width 256 (about 3.5M parameters), 40 epochs, for one accelerator or
a slice. `:gpu,hybrid,packed` has 8 layers of width 128 with attention in every second block; it has
48.8% on the test split (docs/results.md). Accuracy is reported beside a ladder of baselines that
evaluate the top k levels exactly. A model that learns the values of subtrees is process-supervised;
its results are reported apart.

Sums modulo 10 are learned in the order of their numbers of arguments, long after everything else,
and only where sums of two or three digits are frequent. So half of the rows of `:short,packed` hold
as many expressions of at most 20 symbols as fit, each with its value as a label where it ends. With
`:arguments` every sum is one of two arguments first, and then of three; it has 79.5% of the whole
expressions of `:short` and 90.9% of all operators on the test split (docs/results.md).
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config
from spectral_pod.recipes import (
    BASELINES,
    TRANSFORMERS,
    chosen,
    long_range,
    s5,
    schedule,
    small_long_range,
    transformer,
)

# The longest record is below 2,000 symbols; as text it has at most about 4,900 and 13,000 bytes.
SEQ_LEN = {"symbol": 2048, "stripped": 5120, "raw": 16384}
SIZES = ("full", "cpu", "gpu", "overfit", "short")
SUPERVISION = ("answer", "packed", "subtrees", "arguments")
MODELS = ("spectral", "hybrid", "multi_scale", *BASELINES)


def get_config(presets: str = "symbol") -> Config:
    encoding, size, model, labels = chosen(presets, tuple(SEQ_LEN), SIZES, MODELS, SUPERVISION)
    c = long_range()
    c.data.task = "listops"
    c.data.options = ConfigDict(
        {"encoding": encoding, "seed": 0, "train": 96_000, "validation": 2_000, "test": 2_000}
    )
    c.data.seq_len = SEQ_LEN[encoding]
    schedule(c, total=60_000, every=1_500)  # 40 epochs of 96,000
    c.optimizer.learning_rate = 3e-3
    c.optimizer.weight_decay = 0.04

    if model == "hybrid":
        c.model.pattern = ("spectral", "spectral+attention")
    if model == "multi_scale":
        c.model.coarser_scales = (4, 4)
    if model in TRANSFORMERS:  # base_listops_config.py
        transformer(
            c, model, layers=4, width=512, heads=8, hidden=1024, dropout=0.1,
            batch=32, steps=5_000, warmup=1_000, rate=0.05 / 1_000**0.5, decay=0.1,
        )  # fmt: skip
    if model == "s5":  # run_lra_listops.sh
        s5(
            c, layers=8, width=128, state=16, blocks=8, c_init="lecun_normal", dropout=0.0,
            glu="half_glu2", records=96_000, batch=50, epochs=40,
            rate=3e-3, dynamics_rate=1e-3, decay=0.04,
        )  # fmt: skip

    if size in ("cpu", "overfit", "short"):
        small_long_range(c)
        c.train.global_batch_size = 32
    if size == "cpu":
        schedule(c, total=700, every=175, warmup=70)
    if size == "gpu":
        c.model.num_layers = 8
        c.model.unroll = 4
        c.model.hidden_dim = c.model.embed_dim = 128
        c.model.memory_interval = 0
        c.model.spectral.initial = "smooth"
        c.model.spectral.tau_min = 0.5
        c.train.global_batch_size = 64
        schedule(c, total=6_000, every=1_500, warmup=200)
    if size == "short":
        c.data.options.update(min_length=20, max_length=96, max_depth=6, train=400_000)
        c.data.seq_len = {"symbol": 96, "stripped": 320, "raw": 832}[encoding]
        c.model.num_layers = 6
        c.model.patch.stride = 1
        c.model.spectral.initial = "smooth"
        c.model.spectral.tau_min = 0.5
        c.model.memory_interval = 0
        schedule(c, total=12_000, every=1_500, warmup=200)
    if labels != "answer":
        c.data.task = "listops_" + {"packed": "answers"}.get(labels, labels)
        if size in ("gpu", "short"):
            c.data.options.packed = 24_000 if size == "gpu" else 400_000
        c.model.pooling = "none"
        c.model.patch.stride = 1
    if labels == "arguments" and size == "short":
        c.data.options.packed_args = 4
        c.model.num_layers = c.model.unroll = 8
        c.model.spectral.energy_gate = "none"
        c.optimizer.name = "muon"
        schedule(c, total=20_000, every=1_000, warmup=200)
    if size == "overfit":
        c.data.train_records = 100
        c.train.global_batch_size = 25
        c.train.log_every_steps = 25
        c.train.eval_split = "train"
        schedule(c, total=500, every=500, warmup=25)
        c.optimizer.weight_decay = 0.0
    return c
