"""ListOps of the Long Range Arena: the value of a nested expression, 0 to 9.

Command:  python -m spectral_pod.main --config=configs/lra_listops.py --workdir=DIR
          --config=configs/lra_listops.py:stripped or :raw    the other encodings
          --config=configs/lra_listops.py:hybrid              local attention beside the filters
          --config=configs/lra_listops.py:multi_scale         and views of 4 and 16 patches
          --config=configs/lra_listops.py:cpu                 a preset for 15 minutes on 2 cores
          --config=configs/lra_listops.py:overfit             memorises 100 examples in 500 steps

The full preset is 6 layers of width 256 (about 2.5M parameters), 40 epochs, for one accelerator or
a slice. Accuracy is reported beside the ladder: what evaluating the top k levels exactly earns.
"""

from ml_collections import ConfigDict

from spectral_pod.config import default

# The longest record is below 2,000 symbols; spelt out it has at most about 4,900 and 13,000 bytes.
SEQ_LEN = {"symbol": 2048, "stripped": 5120, "raw": 16384}
PRESETS = ("hybrid", "multi_scale", "cpu", "overfit")


def get_config(preset: str = "symbol") -> ConfigDict:
    c = default()
    encoding = preset if preset in SEQ_LEN else "symbol"
    c.data.task = "listops"
    c.data.options = ConfigDict(
        {"encoding": encoding, "seed": 0, "train": 96_000, "validation": 2_000, "test": 2_000}
    )
    c.data.seq_len = SEQ_LEN[encoding]

    c.model.num_layers = 6
    c.model.hidden_dim = 256
    c.model.memory_interval = 2
    c.model.dropout = 0.1
    c.model.remat = "full"

    c.train.total_steps = 76_800  # 40 epochs of 96,000
    c.train.global_batch_size = 50
    c.train.eval_batch_size = 100
    c.train.eval_every_steps = 1_920
    c.train.log_every_steps = 50
    c.checkpoint.every_steps = 1_920
    c.optimizer.learning_rate = 3e-3
    c.optimizer.dynamics_learning_rate = 1e-3
    c.optimizer.warmup_steps = 1_920
    c.optimizer.weight_decay = 0.04

    if preset == "hybrid":
        c.model.pattern = ("spectral+local_attention", "spectral+delta")
        c.model.attention.window = 64
    if preset == "multi_scale":
        c.model.coarser_scales = (4, 4)
    if preset in ("cpu", "overfit"):
        c.model.dtype = "float32"  # CPUs are faster in float32
        c.model.num_layers = 4
        c.model.hidden_dim = 64
        c.model.embed_dim = 64
        c.model.mlp_expansion = 2.0
        c.model.memory.head_dim = 32
        c.model.dropout = 0.0
        c.model.remat = "none"
        c.train.global_batch_size = 32
    if preset == "cpu":
        c.train.total_steps = 700
        c.train.eval_every_steps = 175
        c.checkpoint.every_steps = 175
        c.optimizer.warmup_steps = 70
    if preset == "overfit":
        c.data.train_records = 100
        c.train.total_steps = 500
        c.train.global_batch_size = 25
        c.train.log_every_steps = 25
        c.train.eval_every_steps = 500
        c.train.eval_split = "train"
        c.checkpoint.every_steps = 500
        c.optimizer.warmup_steps = 25
        c.optimizer.weight_decay = 0.0
    if preset not in (*SEQ_LEN, *PRESETS):
        raise ValueError(f"unknown preset {preset!r}; there are {[*SEQ_LEN, *PRESETS]}")
    return c
