"""The Python API of the models; the examples in its docstrings are run unchanged."""

import doctest
import fnmatch
import inspect
import math
import os
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import spectral_pod
from spectral_pod import Config, SpectralGPT, SpectralLLM, SpectralModel, api, models
from spectral_pod.errors import ConfigError, DataError, UserError
from spectral_pod.fields import shown
from spectral_pod.generate import text
from spectral_pod.generate.restore import one_device
from spectral_pod.layers.block import unstack
from spectral_pod.parallel import backend
from spectral_pod.shapes import PAD
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import init_state
from tests.tiny_run import tiny_config, write_run


@pytest.mark.parametrize("module", [api, text], ids=lambda module: module.__name__)
def test_examples(module):
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


@pytest.fixture(scope="module")
def gpt():
    return SpectralGPT(tiny_config())


@pytest.fixture(scope="module")
def classifier():
    small = {"num_layers": 2, "hidden_dim": 16, "embed_dim": 8, "dtype": "float32"}
    return SpectralModel(
        Config(**small, memory={"head_dim": 4}, data={"seq_len": 64}), num_classes=3
    )


def test_where_there_is_no_accelerator_nothing_is_printed_of_one():
    """Although libtpu, which is installed to compile for absent TPUs, would search for one."""
    program = "from spectral_pod import SpectralGPT; import jax; print(jax.devices()[0].platform)"
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.mark.parametrize("device", ["/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", "/dev/kfd"])
def test_accelerators_and_choices_of_the_user_stay(monkeypatch, device):
    chosen = []
    jax_config = types.SimpleNamespace(
        values={"jax_platforms": None}, update=lambda name, value: chosen.append((name, value))
    )
    monkeypatch.setattr(backend.jax, "config", jax_config)
    monkeypatch.setattr(backend.glob, "glob", lambda pattern: fnmatch.filter([device], pattern))
    backend.leave_out_absent_tpus()
    assert not chosen
    monkeypatch.setattr(backend.glob, "glob", lambda pattern: [])
    backend.leave_out_absent_tpus()
    assert chosen == [("jax_platforms", "cpu")]
    jax_config.values["jax_platforms"] = "tpu"
    backend.leave_out_absent_tpus()
    assert len(chosen) == 1


def test_the_package_itself_is_light():
    program = (
        "import sys, spectral_pod, spectral_pod.ops; "
        "sys.exit(any(m in sys.modules for m in ('jax', 'spectral_pod.api')))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert set(spectral_pod.__all__) <= set(dir(spectral_pod))
    with pytest.raises(AttributeError, match="SpectralBERT"):
        _ = spectral_pod.SpectralBERT


# ---- Config


def test_fields_by_every_name():
    config = Config(
        hidden_dim=32,
        pattern=["hyena"],
        memory={"num_heads": 2},
        seed=7,
        data={"task": "lm", "options": {"source": "a file"}},
        optimizer={"learning_rate": 1},
        **{"train.total_steps": 5, "wavelet.levels": 2},
    )
    assert (config.model.hidden_dim, config.model.memory.num_heads, config.seed) == (32, 2, 7)
    assert (config.data.task, config.data.options.source) == ("lm", "a file")
    assert (config.train.total_steps, config.model.wavelet.levels) == (5, 2)
    assert config.optimizer.learning_rate == 1.0
    assert config.model.pattern == ("hyena",)


def test_other_names_of_fields():
    config = Config(
        vocab_size=256, embed_dim=512, num_heads=8, num_layers=12, harmonic_bases=24,
        wavelet_type="db4", wavelet_levels=3,
    ).model  # fmt: skip
    assert (config.embed_dim, config.hidden_dim, config.num_layers) == (512, 512, 12)
    heads = (config.wavelet.num_heads, config.memory.num_heads, config.attention.num_heads)
    assert heads == (8, 8, 8)
    assert (config.harmonics, config.wavelet.name, config.wavelet.levels) == (24, "db4", 3)
    assert Config(embed_dim=8, hidden_dim=16).model.hidden_dim == 16


def test_the_number_of_harmonics():
    small = {"num_layers": 1, "hidden_dim": 16, "data": {"seq_len": 64}}
    model = SpectralLLM(Config(**small, harmonic_bases=5))
    table = model.params["embedding"]
    assert {x.shape[1] for x in jax.tree.leaves(table)} == {5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_dim": 3}, "'hiden_dim'; did you mean 'hidden_dim'"),
        ({"vocab_size": 50257}, "'vocab_size' is 50257; models read bytes"),
        ({"memory": {"heads": 3}}, "no field 'heads'"),
        ({"train.steps": 3}, "no field 'steps'"),
        ({"num_layers": "three"}, "'num_layers'"),
        ({"memory": 3}, "'memory'"),
    ],
)
def test_fields_that_are_none(fields, message):
    with pytest.raises(ConfigError, match=message):
        Config(**fields)


# ---- models


def test_a_new_model_is_what_training_starts_with(gpt):
    config = tiny_config()
    model = models.build(config, seq_len=config.data.seq_len, num_classes=257)
    tx = make_optimizer(config, model, one_device()).tx
    state = init_state(model, tx, one_device(), 0)
    jax.tree.map(np.testing.assert_array_equal, gpt.params, unstack(state.params))
    assert gpt.count_parameters() == sum(x.size for x in jax.tree.leaves(state.params))
    assert isinstance(gpt.module, nn.Module)


def test_a_text_comes_as_its_prompt_came(gpt):
    written = gpt.generate(b"The caf\xc3\xa9", max_length=30, seed=2)
    assert isinstance(written, bytes)
    assert 0 < len(written) <= 30
    assert gpt.generate("The café", max_length=30, seed=2) == written.decode(errors="replace")
    assert gpt.generate(b"The caf\xc3\xa9", max_length=30, seed=3) != written
    stop = written[5:7]
    stopped = gpt.generate(b"The caf\xc3\xa9", max_length=30, seed=2, stop=stop)
    assert stopped == written[: written.index(stop)]
    with pytest.raises(ConfigError, match="empty"):
        gpt.generate("")


def test_logits_of_every_position(gpt):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 30))
    logits = gpt(tokens)
    assert logits.shape == (2, 30, 257)
    greedy = gpt.generate(bytes(tokens[0].tolist()), max_length=1, temperature=0)
    assert greedy == bytes([int(logits[0, -1].argmax())])


def test_a_record_and_a_batch_of_tokens(classifier):
    records = [b"of some bytes", b"x" * 64, b"\x00"]
    tokens = np.full((3, 64), PAD)
    for row, record in zip(tokens, records):
        row[: len(record)] = list(record)
    logits = classifier(tokens)
    for record, expected in zip(records, logits):
        np.testing.assert_allclose(classifier.classify(record), expected, atol=1e-6)


@pytest.mark.parametrize("record", [b"", b"x" * 65])
def test_a_record_of_no_length_or_too_long(classifier, record):
    with pytest.raises(DataError, match=f"{len(record)} bytes; this model takes 1 to 64"):
        classifier.classify(record)


def test_from_checkpoint(tmp_path):
    params = write_run(tmp_path / "run", steps=(3,))
    model = SpectralGPT.from_checkpoint(str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, model.params, unstack(params))
    assert model.config.data.task == "lm"
    with pytest.raises(ConfigError, match=r"holds a spectral_gpt; .* spectral_pod\.SpectralGPT"):
        SpectralLLM.from_checkpoint(str(tmp_path / "run"))


def test_a_model_that_cannot_be():
    with pytest.raises(ConfigError, match=r"model\.pattern has 'spectral'"):
        SpectralGPT(Config(pattern=("spectral",)))
    with pytest.raises(ConfigError, match=r"task .listops. needs one of"):
        SpectralGPT(Config(data={"task": "listops"}))


# ---- nonsense

NONSENSE = [
    None, True, 0, -1, 10**30, 10**400, 1.5, -1.0, math.nan, math.inf, "", "x", "\ud800", b"", b"x",
    bytearray(b"x"), memoryview(b"x"), [], [1, "x"], [b"a"], ("a",), {}, {"x": 1}, {1: 2}, object(),
    int, np.zeros(3), np.float32(0.5), np.array("x"), jnp.ones(3), jax.devices()[0], "a\0b", "gs://",
    "s3://b/x", "~nobody-here/x", "empty", "file", "broken", "float16", ConfigDict(),
    jax.sharding.Mesh(np.array(jax.devices()[:1]), "x"),
]  # fmt: skip
TOKENS = [
    np.zeros((1, 8)), np.zeros((1, 8), bool), np.full((1, 8), 300), np.full((1, 8), -1),
    np.zeros((0, 8), int), np.zeros((1, 0), int), np.zeros(8, int), np.zeros((1, 8, 1), int),
    [[1, 2], [3]], np.array([["a"]]), np.full((1, 8), 2**40),
    np.full((1, 8), np.nan), np.full((1, 8), 1j), np.array([["1"]], object), jnp.zeros((1, 8)),
]  # fmt: skip


def nonsense(gpt, classifier):
    """(function, argument, value, arguments) for every argument of the API, and each value."""
    small = {"num_layers": 1, "hidden_dim": 16, "wavelet": {"levels": 2}, "data": {"seq_len": 64}}
    functions = {
        SpectralGPT: {"config": Config(**small)},
        SpectralLLM: {"config": Config(**small)},
        SpectralModel: {"config": Config(**small), "num_classes": 2},
        SpectralGPT.from_checkpoint: {"workdir": "empty"},
        SpectralGPT.from_export: {"directory": "empty"},
        gpt.generate: {"prompt": "x", "max_length": 1},
        gpt.__call__: {"tokens_BL": None},
        classifier.__call__: {"tokens_BL": None},
    }
    for function, good in functions.items():
        for argument, parameter in inspect.signature(function).parameters.items():
            for value in [*NONSENSE, *(TOKENS if argument == "tokens_BL" else ())]:
                if value is not parameter.default:
                    yield function, argument, value, good | {argument: value}

    def classify(document):
        return classifier.classify(document)

    for value in NONSENSE:
        if not isinstance(value, (bytes, bytearray)):
            yield classify, "document", value, {"document": value}
    for field in ["num_layers", "memory", "memory.gated", "seed", "data.options", "x", "a.b", ""]:
        for value in NONSENSE:
            yield Config, field.rpartition(".")[2], value, {field: value}


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))]
)
def test_nonsense_in_an_argument(gpt, classifier, part, tmp_path, monkeypatch):
    """It is accepted, or one message names the argument or its value."""
    monkeypatch.chdir(tmp_path)
    for folder in ("home", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "broken").symlink_to("nothing")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    if part == 0:  # another sampling is another program to compile
        monkeypatch.setattr(api, "continuations", lambda *args, **options: iter(()))
    before = set(tmp_path.rglob("*"))
    refused = 0
    tried = [*nonsense(gpt, classifier)][part::10]
    for function, argument, value, arguments in tried:
        try:
            function(**arguments)
        except UserError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text
            shows = (argument, shown(value), str(value), "empty holds no", "empty is no workdir")
            assert isinstance(value, dict) or any(name in text for name in shows), (argument, text)
        except Exception as error:
            raise AssertionError(f"{function} of {argument}={value!r:.80}") from error
    assert refused > len(tried) / 2
    assert set(tmp_path.rglob("*")) == before
