"""Decoding gives the logits of the whole sequence, and a text depends only on its own prompt."""

import functools

import jax
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.errors import ConfigError
from spectral_pod.generate import decode
from spectral_pod.generate.decode import Decoder, generate
from spectral_pod.generate.sampling import Sampling, draw
from spectral_pod.layers.block import unstack
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.ops.online_conv import BLOCK
from spectral_pod.shapes import PAD
from tests.models.drawn import drawn_params

LENGTH = 160  # five blocks, so that there are tiles of one, two and four blocks
CAUSAL = sorted(name for name, mixer in MIXERS.items() if mixer.can_be_causal)


@functools.cache
def make(name="spectral_gpt", **overrides):
    """(the model for training, the model for decoding, its parameters, stacked)."""
    config = default()
    small = {
        "name": name, "dtype": "float32", "num_layers": 2, "hidden_dim": 16,
        "memory.head_dim": 4, "memory.num_heads": 2, "attention.num_heads": 2,
        "attention.window": 24, "s5.state_dim": 4, "s5.blocks": 2,
        "selective.rank": 2, "wavelet.num_heads": 2, "wavelet.levels": 2,
    }  # fmt: skip
    small |= {key.replace("__", "."): value for key, value in overrides.items()}
    config.update_from_flattened_dict({f"model.{key}": value for key, value in small.items()})
    build = functools.partial(models.build, config, seq_len=LENGTH, num_classes=257)
    return build(), build(decoding=True), drawn_params(build())


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, tokens_BL):
    return model.apply({"params": params}, tokens_BL, tokens_BL != PAD)


# These are also compared with the whole sequence in tests/layers, or are parts of models below.
SLOW = (
    "linear_attention", "local_attention", "s5", "hyena", "delta", "gated_delta", "wavelet",
)  # fmt: skip
CASES = [
    pytest.param({"pattern": (name,)}, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in CAUSAL
] + [
    {},  # the model's default pattern
    {"name": "spectral_llm", "channel_mixer": "frequency"},
    # Its third layer is beyond the last whole repeat of the pattern.
    {
        "pattern": ("hyena", "hyena+gated_delta"),
        "hyena__filter": "implicit",
        "hyena__order": 3,
        "norm": "post",
        "num_layers": 3,
    },
    {
        "pattern": ("hyena",),
        "hyena__order": 1,
        "hyena__short_conv": 1,
        "hyena__decay": "fixed",
        "positions": "none",
    },
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_incremental_is_the_whole(case):
    """A batch of prompts of several lengths, then given bytes: all logits are those of one pass."""
    rng = np.random.default_rng(0)
    model, decoding, params = make(**case)
    lengths = np.asarray([BLOCK + 3, 1, 2 * BLOCK])
    texts = rng.integers(0, 256, (len(lengths), LENGTH))
    expected = np.asarray(whole(model, params, texts))
    prompt = 2 * BLOCK
    tokens = np.full((len(lengths), prompt), PAD)
    for row, length in enumerate(lengths):
        tokens[row, prompt - length :] = texts[row, :length]
    decoder = Decoder(decoding, unstack(params), tokens, num_positions=LENGTH - prompt)

    def check(logits_BC, after):
        """`after` is the number of bytes read of each text."""
        want = expected[np.arange(len(after)), after - 1]
        np.testing.assert_allclose(logits_BC, want, atol=1e-4 * np.abs(expected).max())

    check(decoder.logits_BC, lengths)
    for start in range(0, LENGTH - prompt, BLOCK):
        places = lengths[:, None] + start + np.arange(BLOCK)[None]
        given = np.take_along_axis(texts, places, axis=1)
        logits_BTC = np.asarray(decoder.force(given))
        for i in range(BLOCK):
            check(logits_BTC[:, i], lengths + start + i + 1)


@pytest.mark.parametrize("name", ["spectral_gpt", "spectral_llm"])
def test_padding_before_a_sequence_changes_nothing(name):
    model, _, params = make(name)
    tokens = np.full((2, LENGTH), PAD, np.int32)
    tokens[0, :100] = tokens[1, 5:105] = np.random.default_rng(0).integers(0, 256, 100)
    logits = np.asarray(whole(model, params, tokens))
    np.testing.assert_allclose(logits[1, 5:105], logits[0, :100], atol=1e-4)


def text_of(prompts, **options):
    _, decoding, params = make()
    texts = [b""] * len(prompts)
    for pieces in generate(decoding, unstack(params), prompts, **options):
        texts = [text + piece for text, piece in zip(texts, pieces)]
    return texts


def test_greedy_text_is_that_of_the_whole_model():
    model, _, params = make()
    (text,) = text_of([b"To be"], num_bytes=50, sampling=Sampling(temperature=0))
    sequence = list(b"To be")
    for _ in range(50):
        padded = np.full((1, LENGTH), PAD)
        padded[0, : len(sequence)] = sequence
        likeliest = int(np.asarray(whole(model, params, padded))[0, len(sequence) - 1].argmax())
        if likeliest == decode.END_OF_DOCUMENT:
            break
        sequence.append(likeliest)
    assert text == bytes(sequence[5:])


def test_a_text_depends_on_its_own_prompt_and_place():
    prompts = [b"a", b"A longer one, of more than a block of positions", b"xyz"]
    together = text_of(prompts, num_bytes=40, seed=3)
    assert together == text_of(prompts, num_bytes=40, seed=3)
    assert together == text_of(prompts, num_bytes=40, seed=3, rows=4)
    assert together != text_of(prompts, num_bytes=40, seed=4)
    assert together[:1] == text_of(prompts[:1], num_bytes=40, seed=3)
    # A shorter text is a prefix.
    assert [text[:7] for text in together] == text_of(prompts, num_bytes=7, seed=3)


def test_more_than_the_context():
    """Whenever a model reaches its context, it reads the last half of it again."""
    (text,) = text_of([b"x" * 300], num_bytes=400, context=LENGTH, sampling=Sampling(top_k=200))
    assert len(text) <= 400
    (same,) = text_of([b"x" * 80], num_bytes=80, context=LENGTH, sampling=Sampling(top_k=200))
    assert text[:80] == same


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty"):
        text_of([b""], num_bytes=3)


# ---- Sampling


def frequencies(logits, sampling, draws=20_000):
    keys = jax.random.split(jax.random.key(0), draws)
    logits_BC = np.broadcast_to(np.float32(logits), (draws, len(logits)))
    drawn = jax.jit(draw, static_argnums=2)(logits_BC, keys, sampling)
    return np.bincount(drawn, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1), ("top_k", 1.5), ("top_p", -0.1), ("top_p", 1.1), ("top_p", float("nan")),
    ],
)  # fmt: skip
def test_a_value_that_means_nothing_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=0.5), np.square([0.1, 0.4, 0.2, 0.3]) / 0.3),
        (Sampling(temperature=0.0), [0, 1, 0, 0]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),  # 0.4 + 0.3 is not yet enough
        (Sampling(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.01), [0, 1, 0, 0]),
        (Sampling(top_p=0), [0, 1, 0, 0]),
        (Sampling(temperature=1e-320), [0, 1, 0, 0]),
        (Sampling(temperature=1e-37), [0, 1, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),  # 4/9 is less than half
    ],
)
def test_tokens_are_drawn_as_often_as_they_should(sampling, expected):
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(frequencies(logits, sampling), expected, atol=0.015)
