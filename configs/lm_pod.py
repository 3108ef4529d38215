"""SpectralGPT on bytes of text, at four sizes, on a TPU slice.

    launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v4-128 --spot -- \\
        --config=configs/lm_pod.py:1b --workdir=gs://BUCKET/run --config.data.dir=gs://BUCKET/data
    python -m tools.preflight --config=configs/lm_pod.py:1b --topology=v4-128    first: does it fit?

`:125m` (the default), `:350m`, `:1b` and `:7b` read 8,192 bytes, `:125m_32k` to `:7b_32k` 32,768,
at the same bytes a batch. One configuration serves slices of 64 to 512 chips: `mesh.data` is what
`mesh.fsdp`, over which parameters and optimizer state are split, leaves of them. Where a batch of
32K has fewer rows than there are chips, split its positions: `--config.mesh.sequence=2`, or 4 on
512 chips. Where memory does not suffice: `--config.train.grad_accumulation=2`, or more, up to the
rows of a chip.

The default text is TFDS's wiki40b/en, some 10 GB, which is written as a store once. The larger
sizes need more: name another set for each of `--config.data.options.train`, `.validation` and
`.test`, as in `tfds:NAME/train`, or a store, `--config.data.stores="('gs://BUCKET/STORE',)"`.

Layers, widths and learning rates are those of GPT-3 (Brown et al. 2020, table 2.1: Small, Medium,
XL and 6.7B), as are beta_2, weight decay, clipping and the 375M tokens of warm-up. Four bytes count
as a token: batches are of 1M tokens, for `:7b` of 2M. GPT-3 has half as many for the smaller two;
here they are as many rows as 512 chips need. Hidden widths are 8/3 of the width, rounded up, as
those of LLaMA (Touvron et al. 2023). That makes 107M, 370M, 1.46B and 7.6B parameters. Training
ends after 20 tokens a parameter (Hoffmann et al. 2022, "Training compute-optimal large language
models"), which is 8.4 GB, 29 GB, 113 GB and 604 GB of text. All of this was found for Transformers
on tokens: that it serves this model on bytes is not known. Filters are implicit, as those of Hyena
(Poli et al. 2023), so that the number of parameters hardly depends on the context.

None of the sizes has been trained, and none has run on a TPU: the loss that they reach is not
known. Memory, time and cost by the compiler are in docs/results.md, "Pods", and by preflight.
"""

from typing import NamedTuple

from spectral_pod.config import Config, default
from spectral_pod.recipes import learning_rates, schedule


class Size(NamedTuple):
    layers: int
    width: int
    hidden: int  # width of the channel mixer
    batch_bytes: int
    rate: float
    steps: int
    fsdp: int


SIZES = {
    "125m": Size(12, 768, 2048, 2**22, 6e-4, 2_000, fsdp=1),
    "350m": Size(24, 1024, 2816, 2**22, 3e-4, 7_000, fsdp=8),
    "1b": Size(24, 2048, 5632, 2**22, 2e-4, 27_000, fsdp=16),
    "7b": Size(32, 4096, 11008, 2**23, 1.2e-4, 72_000, fsdp=64),
}
CONTEXTS = {"": 8_192, "_32k": 32_768}
PRESETS = {name + suffix: (name, suffix) for suffix in CONTEXTS for name in SIZES}
WARMUP_BYTES = 1_500_000_000
HEAD_DIM = 128  # of a memory: the most that the kernel for TPUs serves


def get_config(preset: str = "125m") -> Config:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {tuple(PRESETS)}")
    name, suffix = PRESETS[preset]
    size, seq_len = SIZES[name], CONTEXTS[suffix]
    c = default()
    c.data.task = "lm"
    for split in ("train", "validation", "test"):
        c.data.options[split] = f"tfds:wiki40b/en/{split}"
    c.data.seq_len = seq_len
    c.model.name = "spectral_gpt"
    c.model.num_layers = size.layers
    c.model.hidden_dim = c.model.embed_dim = size.width
    c.model.mlp_expansion = size.hidden / size.width
    c.model.hyena.filter = "implicit"
    c.model.memory.num_heads = size.width // HEAD_DIM
    c.model.memory.head_dim = HEAD_DIM
    c.model.remat = "full"
    c.mesh.fsdp = size.fsdp
    c.train.global_batch_size = c.train.eval_batch_size = size.batch_bytes // seq_len
    schedule(c, total=size.steps, every=500, warmup=WARMUP_BYTES // size.batch_bytes)
    learning_rates(c, size.rate)
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.train.on_bad_step = "skip"  # rather than leave a slice idle
    c.train.sample_bytes = 0  # decoding, which preflight does not compile, needs memory of its own
    return c
