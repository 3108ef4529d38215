"""SpectralGPT on bytes of text, at four sizes, on a pod slice."""

from spectral_pod.config import Config, default
from spectral_pod.recipes import learning_rates, schedule

# layers, width, hidden width of the channel mixer, memories, rows, rate, steps, fsdp
_SIZES = {
    "125m": (12, 768, 2048, 6, 512, 6e-4, 2_000, 1),
    "350m": (24, 1024, 2816, 8, 512, 3e-4, 7_000, 8),
    "1b": (24, 2048, 5632, 16, 512, 2e-4, 27_000, 16),
    "7b": (32, 4096, 11008, 32, 1024, 1.2e-4, 72_000, 64),
}
_CONTEXTS = {"8k": 8_192, "32k": 32_768}
PRESETS = (*_SIZES, *(f"{size}_32k" for size in _SIZES))


def get_config(preset: str = "125m") -> Config:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {PRESETS}")
    size, _, context = preset.partition("_")
    layers, width, hidden, heads, rows, rate, steps, fsdp = _SIZES[size]
    c = default()
    c.data.task = "lm"
    for split in ("train", "validation", "test"):
        c.data.options[split] = f"tfds:wiki40b/en/{split}"
    c.data.seq_len = _CONTEXTS[context or "8k"]
    c.model.name = "spectral_gpt"
    c.model.num_layers = layers
    c.model.hidden_dim = c.model.embed_dim = width
    c.model.mlp_expansion = hidden / width
    c.model.hyena.filter = "implicit"
    c.model.memory.num_heads = heads
    c.model.memory.head_dim = 128
    c.model.remat = "full"
    c.mesh.fsdp = fsdp
    c.train.global_batch_size = c.train.eval_batch_size = rows * 8_192 // c.data.seq_len
    schedule(c, total=steps, every=500, warmup=400)
    learning_rates(c, rate)
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.train.sample_bytes = 0
    return c
