"""The commands of README.md and docs/, up to what they would rent, run or write.

A command is a line of an indented block. A fenced block of Python with a title is a file of that
name.
`docs/test_tutorials.py` runs those of tutorials.
"""

import importlib
import re
import shlex
import subprocess
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from spectral_pod import command_line, models
from spectral_pod.analysis import hardware
from spectral_pod.generate.decode import Decoder
from spectral_pod.layers.block import unstack
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.models.model import init_params
from spectral_pod.ops.online_conv import BLOCK
from spectral_pod.validation import validate, validate_mesh
from tests.launch import gcloud
from tests.trainer import ROOT
from tools import ablate, gke, pack, preflight, shell, sweep, sweep_worker, unpack

GPUS_OF_A_NODE = 8


# Commands of results.md have placeholders for configs and options; test_docs.py looks at them.
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "results.md"),
]


def lines_of(*pages):
    """The lines of the indented blocks of pages, with what continues them, without comments."""
    text = "\n".join(page.read_text() for page in pages)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    return [line.partition(" #")[0] for line in re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)]


def files_of(*pages):
    """{name: text} of the files that pages show."""
    text = "\n".join(page.read_text() for page in pages)
    found = re.findall(r'^```python title="([^"]+)"\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    return dict(found)


def commands():
    """Those that train or compile a config."""
    return [line for line in lines_of(*PAGES) if "--config=" in line and line[0] not in "-."]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """The working folder: it has the files that the pages show."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, text in files_of(*PAGES).items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    with mock.patch.dict(MIXERS):  # howto/mixer.md adds one
        yield folder


def devices(words):
    """How many chips a command trains on, by its own options."""
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    if name := options.get("topology") or options.get("type"):
        return hardware.parse(name, int(options.get("num_slices", 1))).num_devices
    if "launch/slurm.sh" in words or "gpu" in options:
        return int(options.get("nodes") or options["num_nodes"]) * GPUS_OF_A_NODE
    return GPUS_OF_A_NODE if "launch/docker_gpu.sh" in words else 1


def test_they_are_found():
    text = " ".join(commands())
    for name in ("tools.preflight", "tpu_pod.sh", "tools.gke", "docker_gpu.sh", "slurm.sh"):
        assert name in text
    assert devices(["--topology=v5p:4x4x4", "--num_slices=2"]) == 128


def config_of(words):
    """The configuration, with the values of flags."""
    config, rest = shell._load_config([word for word in words if word.startswith("--config")])
    assert not rest
    return config


def words_of(command):
    return shlex.split(re.split(" [|>] ", command)[0].replace("BUCKET", "bucket"))


@pytest.mark.parametrize("command", commands())
def test_its_config_fits_the_devices(command):
    words = words_of(command)
    config = config_of(words)
    validate(config)
    validate_mesh(config, devices(words))


def of(launcher):
    return [words_of(command) for command in commands() if launcher in command]


@pytest.mark.parametrize("words", of("tpu_pod.sh"), ids=" ".join)
def test_its_slice_would_be_asked_for(words):
    """All that gcloud would be told, by the launcher itself."""
    here, *arguments = (word.replace("PROJECT", "project-1") for word in words)
    arguments.insert(0, "--dry_run")
    done = subprocess.run([ROOT / here, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (create,) = (line for line in done.stdout.splitlines() if "queued-resources create" in line)
    gcloud.parse(shlex.split(create)[1:])


@pytest.mark.parametrize("words", of("tools.gke"), ids=" ".join)
def test_its_job_set_would_be_written(words, capsys):
    assert gke.main(words[words.index("tools.gke") + 1 :]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "JobSet"


@pytest.mark.parametrize("words", of("tools.preflight"), ids=" ".join)
def test_its_steps_would_be_compiled(words, monkeypatch):
    """Its command line is one; compiling takes minutes."""
    parsed = []
    monkeypatch.setattr(preflight, "preflight", parsed.append)
    assert preflight.main(words[words.index("tools.preflight") + 1 :]) == 0
    hardware.parse(parsed[0].topology, parsed[0].num_slices)


@pytest.mark.parametrize("words", of("tools.ablate"), ids=" ".join)
def test_its_variants_would_be_trained(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ablate.main([*words[words.index("tools.ablate") + 1 :], "--dry_run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1


@pytest.mark.parametrize("words", of("tools.sweep"), ids=" ".join)
def test_its_sweep_would_begin(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_worker.Worker, "run", lambda worker: 0)
    assert sweep.main(words[words.index("tools.sweep") + 1 :]) == 0


TRAINERS = ("launch/local.sh", "spectral-pod", "spectral_pod.main", "launch/slurm.sh")


@pytest.mark.parametrize(
    "words", [w for t in TRAINERS for w in of(t) if "--" not in w], ids=" ".join
)
def test_the_trainer_would_take_its_flags(words):
    name = next(word for word in words if word in TRAINERS)
    trainer = command_line.parse_trainer(words[words.index(name) + 1 :])
    assert trainer.workdir.value


TOOL = re.compile(r"python -m (?:spectral_pod\.)?(tools\.[a-z_.]*[a-z])")
OF_TOOLS = [line for line in lines_of(*PAGES) if TOOL.search(line) and line.startswith("python")]


@pytest.mark.parametrize("command", OF_TOOLS)
def test_its_tool_would_take_its_flags(command):
    """All that the tool's own command line checks, before the tool works."""
    module, words = TOOL.search(command)[1], words_of(command)
    argv = words[words.index(next(word for word in words if word.endswith(module))) + 1 :]
    parsers = []
    with mock.patch.object(shell, "run", lambda parser, *_, **__: parsers.append(parser)):
        importlib.import_module(module).main(argv)
    shell._parse(parsers[0], argv)


@pytest.mark.parametrize(
    "command", [line for line in lines_of(*PAGES) if line.startswith("gcloud compute tpus")]
)
def test_gcloud_has_the_command(command):
    gcloud.parse(shlex.split(command)[1:])


def test_the_mixer_of_the_page_decodes_exactly():
    """Its logits of a whole sequence, and of a prompt that is continued byte by byte."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 3 * BLOCK)), jnp.int32)
    flags = [
        "--config=average.py", "--config.model.pattern=('average',)", "--config.model.num_layers=2",
        "--config.model.dtype=float32", f"--config.data.seq_len={tokens.shape[1]}",
    ]  # fmt: skip
    config = config_of(flags)
    validate(config)

    def model(**options):
        return models.build(config, seq_len=tokens.shape[1], num_classes=256, **options)

    params = nn.unbox(jax.jit(lambda key: init_params(model(), key))(jax.random.key(0)))
    whole = jax.jit(model().apply)({"params": params}, tokens, jnp.ones(tokens.shape, bool))
    decoder = Decoder(
        model(decoding=True), unstack(params), tokens[:, :BLOCK], num_positions=2 * BLOCK
    )
    np.testing.assert_allclose(decoder.logits_BC, whole[:, BLOCK - 1], atol=1e-4)
    for start in (BLOCK, 2 * BLOCK):
        logits = decoder.force(tokens[:, start : start + BLOCK])
        np.testing.assert_allclose(logits, whole[:, start : start + BLOCK], atol=1e-4)


def test_a_run_would_be_moved(monkeypatch):
    """By the commands for a GPU without internet, up to the files."""
    text, calls = (ROOT / "docs/gpus.md").read_text(), []
    for name, module in (("pack", pack), ("unpack", unpack)):
        monkeypatch.setattr(module, name, calls.append)
        (rest,) = re.findall(rf"^ {{4}}python -m spectral_pod\.tools\.{name} (.*)$", text, re.M)
        assert module.main(shlex.split(rest, comments=True)) == 0
    assert calls[0].workdir == calls[1].workdir
    (flags,) = re.findall(r"^ {4}spectral-pod (.*)$", text, re.M)
    trainer = command_line.parse_trainer(shlex.split(flags))
    assert trainer.workdir.value == calls[0].workdir
    assert trainer.stop_after_minutes.value == 12


@pytest.mark.parametrize("words", of("docker_gpu.sh"), ids=" ".join)
def test_its_container_would_be_started(words, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "as a user would have it")
    here, *arguments = words
    done = subprocess.run(
        [ROOT / here, "--dry_run", *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "'docker' 'run'" in done.stdout
