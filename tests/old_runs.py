"""The configs of the runs in `fixtures/workdirs_24bfa95.tar.xz`.

The runs stopped at step 4 of 8, at the commit in the name. `facts.json`, next to their workdirs,
has what that version computed from them.
"""

from ml_collections import ConfigDict

from spectral_pod.config import default


def get_config(name):
    c = default()
    c.model.dtype = "float32"
    c.model.hidden_dim = 16
    c.model.memory.head_dim = 8
    c.model.memory.clip = 10 / 8**0.5  # as it was
    c.model.hyena.order = 1
    c.model.dropout = 0.1
    c.train.total_steps = 8
    c.train.global_batch_size = 8
    c.train.eval_every_steps = 4
    c.train.log_every_steps = 2
    c.train.compilation_cache = False
    c.checkpoint.every_steps = 4
    c.optimizer.warmup_steps = 2
    return {"classifier": classifier, "gpt": language_model, "llm": spectral_llm}[name](c)


def classifier(c):
    c.data.task = "listops"
    c.data.options = ConfigDict({"train": 64, "validation": 16, "test": 16, "num_workers": 1})
    c.data.seq_len = 256
    c.data.truncate = True
    c.model.num_layers = 2
    c.model.embed_dim = 8
    c.train.grad_accumulation = 2
    c.train.eval_batch_size = 16
    return c


def language_model(c):
    c.data.task = "lm"
    c.data.options = ConfigDict({"source": "speech.txt"})  # not needed once there is a store
    c.data.seq_len = 64
    c.model.name = "spectral_gpt"
    c.model.num_layers = 3
    c.model.memory.num_heads = 2
    c.train.eval_batch_size = 8
    c.train.eval_split = "validation"
    c.train.sample_bytes = 8
    return c


def spectral_llm(c):
    c = language_model(c)
    c.model.name = "spectral_llm"
    c.model.memory_interval = 0
    c.model.wavelet.num_heads = 2
    c.model.wavelet.levels = 2
    c.model.channel_mixer = "frequency"
    c.model.consistency_weight = 0.1
    return c
