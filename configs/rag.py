"""A small SpectralGPT that answers from passages of documents, by conversations with a search.

    launch/local.sh --config=configs/rag.py --workdir=DIR
    python -m tools.rag evaluate --workdir=DIR

`:oracle` reads the one passage with the fact, `:none` no passage at all; both are to compare with.
Facts, persons and documents are those of `spectral_pod/data/tasks/rag.py`: generated facts in files
of Python's standard library, or of `--config.data.options.source=FOLDER`. Accuracy is that of
symbols. After 4,400 steps, about an hour of two free cores with `--config.mesh.data=2`, 96.0% of
the answers about new documents are exact and cite the right passage, and 82.0% of the questions
without an answer are recognised (docs/results.md).
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config, default
from spectral_pod.recipes import schedule, small_conversations

SEQ_LEN = {"retrieved": 928, "oracle": 416, "none": 80}


def get_config(form: str = "retrieved") -> Config:
    if form not in SEQ_LEN:
        raise ValueError(f"unknown form {form!r}; there are {list(SEQ_LEN)}")
    c = default()
    c.data.task = "rag"
    c.data.options = ConfigDict({"passages": form})
    c.data.seq_len = SEQ_LEN[form]
    small_conversations(c)
    c.model.dtype = "float32"  # CPUs are faster in float32
    c.optimizer.name = "muon"
    c.train.global_batch_size = 8
    schedule(c, total=4400, every=1100, warmup=200)
    return c
