"""The commands of README.md and docs/gpus.md, up to what they would rent, run or write."""

import re
import runpy
import shlex
import subprocess

import pytest
import yaml

from spectral_pod import command_line
from spectral_pod.analysis import hardware
from spectral_pod.validation import get, validate, validate_mesh
from tests.launch import gcloud
from tests.trainer import ROOT
from tools import ablate, gke, pack, preflight, sweep, sweep_worker, unpack

GPUS_OF_A_NODE = 8


def commands():
    """The lines of code blocks that train or compile a config, with what continues them."""
    files = ("README.md", "docs/gpus.md", "docs/pods.md")
    text = "".join((ROOT / name).read_text() for name in files).replace("\\\n", " ")
    lines = re.findall(r"^ {4}(.+)$", text, re.MULTILINE)
    return [line.partition(" #")[0] for line in lines if "--config=" in line]


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
    """The configuration, with the numbers and words that flags set."""
    flags = dict(
        word.removeprefix("--").partition("=")[::2] for word in words if "--config" in word
    )
    file, _, preset = flags.pop("config").partition(":")
    config = runpy.run_path(str(ROOT / file))["get_config"](*filter(None, [preset]))
    for flag, text in flags.items():
        field = flag.removeprefix("config.")
        value = int(text) if text.isdigit() else text
        if not field.startswith("data.options."):
            get(config, field)  # which exists
            config.update_from_flattened_dict({field: value})
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
