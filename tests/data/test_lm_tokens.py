"""Language models of tokens: against the library's own encoding of the whole text."""

import math
import sys

import jax
import numpy as np
import pytest
import tokenizers

from spectral_pod import models, objectives
from spectral_pod.data import tasks, vocabulary
from spectral_pod.data.byte_store import ByteStore
from spectral_pod.errors import CheckpointError, ConfigError, DataError
from spectral_pod.generate import decode, export
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.sampling import Sampling
from spectral_pod.generate.text import continuations
from spectral_pod.layers.block import unstack
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.shapes import EOS, PAD, VOCAB_SIZE, symbol
from spectral_pod.train.sources import open_sources
from tests.models.drawn import drawn_params
from tests.tiny_run import tiny_config, write_run

LINES = [f"The café has {n} chairs,\n\n  and {n * n} café tables.\n" for n in range(400)]
TEXTS = {
    "train": "".join(LINES[:300]), "valid": "".join(LINES[300:350]), "test": "".join(LINES[350:]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forget():
    vocabulary.of.cache_clear()


@pytest.fixture
def files(tmp_path):
    for split, text in TEXTS.items():
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    return tmp_path


def byte_level(path, size=400):
    """A byte-level BPE of the texts, as GPT-2's, which would cut and pad texts if it were asked."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(LINES, trainer)
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path))
    return plain


def opened(files, **options):
    config = tiny_config(**{"data.seq_len": 16, "data.dir": str(files / "data")})
    config.data.options = {"source": str(files / "wiki.*.tokens"), **options}
    return open_sources(config)


def windows(sources, split):
    """Tokens and labels of a split, all windows in a row, without padding."""
    (source,) = sources.evaluation(split).values()
    batches = [
        source.rows(step, np.arange(source.batch_size)) for step in range(source.steps_per_epoch)
    ]
    valid = np.concatenate([batch["valid"] for batch in batches])
    return (np.concatenate([batch[name] for batch in batches])[valid]
            for name in ("tokens", "labels"))  # fmt: skip


def test_the_stream_is_that_of_the_library(files):
    plain = byte_level(files / "tokenizer.json")
    sources = opened(files, tokenizer=str(files / "tokenizer.json"))
    size = plain.get_vocab_size()
    assert size > 300
    assert (sources.num_classes, sources.vocab_size) == (size + 1, size + VOCAB_SIZE - 256)
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        expected = plain.encode(TEXTS[name]).ids
        tokens, labels = windows(sources, split)
        np.testing.assert_array_equal(labels, [*expected[1:], size])
        np.testing.assert_array_equal(tokens, [symbol(t) for t in expected])
        assert max(expected) >= 256
        assert plain.decode(expected) == TEXTS[name]


def test_symbols_are_no_special_tokens():
    every = symbol(np.arange(5000))
    assert len(set(every.tolist())) == 5000
    assert not set(every.tolist()) & set(range(PAD, VOCAB_SIZE))
    assert symbol(255) == 255
    assert symbol(256) == VOCAB_SIZE


@pytest.mark.parametrize("size", [2_000, 70_000])
def test_large_vocabularies_are_stored_whole(files, size):
    """A tokenizer of words, whose last ones do not fit into 16 bits where it is large."""
    words = {word: i for i, word in enumerate(dict.fromkeys("".join(LINES).split()))}
    words |= {f"unused {i}": i for i in range(len(words), size - 2)}
    words |= {"the": size - 2, "[UNK]": size - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(files / "words.json"))
    (files / "wiki.test.tokens").write_text("the unknown café the")
    sources = opened(files, tokenizer=str(files / "words.json"))
    _, labels = windows(sources, "test")
    assert labels.tolist() == [size - 1, words["café"], size - 2, size]


def test_bits_and_words_are_those_of_the_original_text(files):
    """Of a model that gives all classes the same probability, whose loss is known."""
    plain = byte_level(files / "tokenizer.json")
    sources = opened(files, tokenizer=str(files / "tokenizer.json"))
    assert sources.objective is objectives.NextToken
    (source,) = sources.evaluation("test").values()
    count = len(plain.encode(TEXTS["test"]).ids)  # with the end, and without the first
    nats = count * math.log(sources.num_classes)
    values = {"loss": nats / count, "accuracy": 0.0, "positions": count, **source.totals}
    scalars = sources.objective.scalars(values)
    num_bytes = len(TEXTS["test"].encode()) + 1
    words = len(TEXTS["test"].split()) + TEXTS["test"].count("\n")
    assert scalars["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes)
    assert scalars["word_perplexity"] == pytest.approx(math.exp(nats / words))
    assert scalars["perplexity"] == pytest.approx(sources.num_classes)
    assert not {"bytes", "words", "positions"} & scalars.keys()
    assert "bits per byte" in sources.objective.eval_line("test", values)
    training = sources.objective.scalars({"loss": 1.0, "accuracy": 0.0})
    assert training.keys() == {"loss", "accuracy", "perplexity"}


def test_bytes_are_as_before(files):
    sources = opened(files)
    assert sources.objective is objectives.NextByte
    assert (sources.num_classes, sources.vocab_size) == (257, VOCAB_SIZE)
    tokens, labels = windows(sources, "test")
    assert bytes(tokens.tolist()) == TEXTS["test"].encode()
    assert labels.tolist() == [*TEXTS["test"].encode()[1:], 256]
    assert "tokenizer_sha256" not in sources.provenance


def test_what_is_not_utf8_is_refused(files):
    """Where it stands; a document that is cut within a character is not."""
    byte_level(files / "tokenizer.json")
    options = {"tokenizer": str(files / "tokenizer.json")}
    (files / "wiki.valid.tokens").write_bytes(b"caf\xe9")
    with pytest.raises(
        DataError, match=r"wiki\.valid\.tokens: not UTF-8, .*: byte 3; or leave out"
    ):
        opened(files, **options)
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        vocabulary.of(options["tokenizer"]).encode(b"x\xff")
    (files / "one.txt").write_text("é" * 1001)
    cut = opened(files, source=str(files / "one.txt"), **options)
    assert "train" in cut.provenance["splits"]


# ---- generation


def test_greedy_tokens_are_those_of_the_whole_model():
    config = tiny_config(**{"model.dtype": "float32"})
    sizes = {"seq_len": 96, "num_classes": 501, "vocab_size": 504}
    model, decoding = (models.build(config, decoding=d, **sizes) for d in (False, True))
    params = jax.device_put(drawn_params(model))
    logits_of = jax.jit(lambda tokens: model.apply({"params": params}, tokens, tokens != PAD))
    (pieces,) = zip(*decode.generate_tokens(
        decoding, unstack(params), [[3, 300, 499]], num_tokens=40,
        sampling=Sampling(temperature=0),
    ))  # fmt: skip
    written = [token for piece in pieces for token in piece]
    sequence = [3, 300, 499]
    for token in written:
        padded = np.full((1, 96), PAD, np.int32)
        padded[0, : len(sequence)] = [symbol(t) for t in sequence]
        assert int(logits_of(padded)[0, len(sequence) - 1].argmax()) == token
        sequence.append(token)
    assert max(written) >= 256


def test_texts_go_through_the_tokenizer(files):
    plain = byte_level(files / "tokenizer.json")
    tokens = vocabulary.of(str(files / "tokenizer.json"))
    for text in (TEXTS["test"], "", "é", "\n\n x", "\U0001f600"):
        ids = tokens.encode(text.encode()).tolist()
        assert ids == plain.encode(text).ids
        decoder = tokens.decoder()
        assert b"".join(decoder([token]) for token in ids) == text.encode()


def run(files, **options):
    config = tiny_config()
    config.data.options = {"source": "a", "tokenizer": str(files / "tokenizer.json"), **options}
    write_run(files / "run", config)
    return restore_for_inference(str(files / "run"))


def continued(trained):
    with on_mesh(trained.mesh):
        return list(continuations(trained, ["The café".encode()], num_bytes=9, seed=1))


def test_a_trained_model_continues_texts(files):
    plain = byte_level(files / "tokenizer.json")
    trained = run(files)
    with on_mesh(trained.mesh):
        rows = list(continuations(trained, ["The café".encode()], num_bytes=30, seed=1))
        (tokens,) = zip(*decode.generate_tokens(
            trained.module, trained.params, [plain.encode("The café").ids], num_tokens=30, seed=1,
            context=decode.context_of(trained.module),
        ))  # fmt: skip
    text = b"".join(piece for (piece,) in rows).decode()
    expected = plain.decode([token for piece in tokens for token in piece])
    assert text
    assert expected.startswith(text)  # an incomplete character may be missing at its end
    assert len(expected) - len(text) <= 3


def test_an_export_has_the_tokenizer(files, tmp_path):
    byte_level(files / "tokenizer.json")
    trained, folder = run(files), tmp_path / "export"
    export.save(trained, str(folder))
    card = (folder / "README.md").read_text()
    assert "reads tokens and predicts the token that follows" in card
    assert "3,072 tokens, padding included" in card
    expected = continued(trained)
    (files / "tokenizer.json").unlink()
    vocabulary.of.cache_clear()
    assert continued(export.load(str(folder))) == expected
    damaged = (folder / "tokenizer.json").read_bytes()[:-1]
    (folder / "tokenizer.json").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged: its sha256"):
        export.load(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"it has no file tokenizer\.json"):
        export.load(str(folder))


# ---- errors


def test_a_model_of_another_tokenizer(files):
    byte_level(files / "tokenizer.json")
    run(files)
    vocabulary.of.cache_clear()
    byte_level(files / "tokenizer.json", size=350)
    with pytest.raises(DataError, match=r"options\.tokenizer = .* has 350 tokens, and the model"):
        restore_for_inference(str(files / "run"))
    # As many tokens, and in other places.
    vocabulary.of.cache_clear()
    byte_level(files / "tokenizer.json")
    text = (files / "tokenizer.json").read_text()
    swapped = text.replace('"Q":', '"?":').replace('"R":', '"Q":').replace('"?":', '"R":')
    (files / "tokenizer.json").write_text(swapped)
    assert swapped != text
    with pytest.raises(DataError, match=r"had .*; put the file there that it was trained with"):
        restore_for_inference(str(files / "run"))
    vocabulary.of.cache_clear()
    (files / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"options\.tokenizer = .*tokenizer\.json cannot be opened"):
        restore_for_inference(str(files / "run"))


def test_a_store_of_another_tokenizer(files):
    byte_level(files / "tokenizer.json")
    store = ByteStore(
        next(iter(opened(files, tokenizer=str(files / "tokenizer.json")).stores.values())).path
    )
    vocabulary.of.cache_clear()
    byte_level(files / "tokenizer.json", size=350)
    with pytest.raises(DataError, match=r"holds tokens of another tokenizer, and .*tokenizer is"):
        opened(files, tokenizer=str(files / "tokenizer.json")).training()
    config = tiny_config(**{"data.seq_len": 16})
    config.data.stores = (store.path,)
    with pytest.raises(DataError, match=r"holds tokens of another tokenizer, and .* is ''"):
        open_sources(config).training()
    config.data.stores = (next(iter(opened(files).stores.values())).path,)
    config.data.options = {"tokenizer": str(files / "tokenizer.json")}
    with pytest.raises(DataError, match="holds bytes, not tokens of a tokenizer"):
        open_sources(config).training()


def test_no_tokenizer(files, monkeypatch):
    (files / "x.json").write_text('{"no": "tokenizer"}')
    with pytest.raises(DataError, match=r"options\.tokenizer = '.*x\.json' is no tokenizer of"):
        vocabulary.of(str(files / "x.json"))
    task = tasks.make("lm", {"tokenizer": str(files / "missing.json")})
    with pytest.raises(DataError, match=r"options\.tokenizer = .*missing\.json cannot be opened"):
        _ = task.vocab_size
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'spectral-pod\[tokenizers\]'"):
        vocabulary.of(str(files / "x.json"))


def test_the_end_of_a_document_is_read_as_one():
    assert int(decode._as_input(np.int32(500), 500)) == EOS
    assert int(decode._as_input(np.int32(256), 256)) == EOS
    assert int(decode._as_input(np.int32(256), 500)) == symbol(256)
