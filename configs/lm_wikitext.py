"""WikiText-103, or any text with files of its own for validation and test, as bytes.

    launch/local.sh --config=configs/lm_wikitext.py --workdir=DIR \\
        --config.data.options.train=wikitext-103/wiki.train.tokens \\
        --config.data.options.validation=wikitext-103/wiki.valid.tokens \\
        --config.data.options.test=wikitext-103/wiki.test.tokens

These are the defaults. A source can also be compressed, JSON lines or parquet with a field `text`,
a folder, a glob, or a split of TFDS. Evaluations report nats, bits per byte and word perplexity,
exp(nats of all bytes / words): what white space separates is a word, and so is every end of a line,
as WikiText counts (Merity et al. 2016, "Pointer sentinel mixture models": 217,646 for validation,
245,569 for test). So it compares with published figures of models that read words. The number of
words in every split is in the store's manifest.

With `--config.data.options.tokenizer=tokenizer.json`, a file of the library `tokenizers` (`pip
install 'spectral-pod[tokenizers]'`), the model predicts its tokens in place of bytes. Then
perplexity is that of a token, as it is published for models with this tokenizer; bits per byte and
word perplexity are still of the original bytes and words, which tokens do not change.

`:cpu` (the default) trains SpectralGPT with 0.7M parameters on two CPU cores, `:gpu` one of 15M
parameters on a GPU. Neither has been trained on WikiText-103 yet.
"""

from spectral_pod.config import Config
from spectral_pod.recipes import gpu_language_model, small_language_model, split_files

SIZES = ("cpu", "gpu")


def get_config(size: str = "cpu") -> Config:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {SIZES}")
    c = small_language_model()
    split_files(c, "wikitext-103/wiki.{}.tokens")
    c.train.sample_prompt = " = Homer = "
    if size == "gpu":
        gpu_language_model(c)
        c.train.total_steps = 20_000
    return c
