"""NVIDIA's driver of this machine, by stand-ins, and what is said where JAX cannot use a GPU."""

import importlib.metadata
import re
import subprocess

import pytest

from spectral_pod.errors import ConfigError
from spectral_pod.parallel import backend, gpu_driver
from tests.launch.test_setup import VERSIONS
from tests.trainer import ROOT


@pytest.mark.parametrize(("text", "expected"), VERSIONS)
def test_the_version_of_the_driver(tmp_path, monkeypatch, text, expected):
    file = tmp_path / "version"
    file.write_text(f"NVRM version: {text}\nGCC version:  gcc version 12.3.0 (x)\n")
    assert gpu_driver.version(str(file)) == expected
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_driver.version(str(tmp_path / "none")) is None


@pytest.mark.parametrize(("answer", "expected"), [("echo 550.1", "550.1"), ("exit 9", None)])
def test_the_version_by_nvidia_smi(tmp_path, monkeypatch, answer, expected):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_driver.version(str(tmp_path / "none")) == expected


@pytest.mark.parametrize(
    ("driver", "plugins", "named"),
    [
        (None, {13: "1.2"}, r"no driver of NVIDIA.*--gpus=all"),
        ("470.57.02", {12: "1.2"}, "470.57.02, and CUDA 12 needs 525"),
        ("550.54.15", {}, r"plugin is not installed: pip install 'jax\[cuda12\]==1.2'"),
        ("580.65.06", {}, r"plugin is not installed: pip install 'jax\[cuda13\]==1.2'"),
        ("550.54.15", {13: "1.2"}, r"CUDA 13, .* needs 580 or newer.*CUDA=12"),
        ("580.65.06", {12: "1.1"}, "JAX 1.2, its plugin for CUDA 12 1.1; .*same version"),
    ],
)
def test_the_reason_is_named(driver, plugins, named):
    assert re.search(named, gpu_driver.explain(driver, plugins, "1.2"))


def test_hidden_devices_are_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in gpu_driver.explain("580.1", {13: "1.2"}, "1.2")


def test_plugins_are_found_by_their_packages(monkeypatch):
    def version(name):
        if name == "jax-cuda12-plugin":
            return "1.2"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert gpu_driver.plugins() == {12: "1.2"}


@pytest.mark.parametrize("failure", [RuntimeError("Unable to initialize"), AssertionError(), None])
def test_a_run_that_demands_a_gpu_says_why_there_is_none(monkeypatch, failure):
    def default_backend():
        if failure:
            raise failure
        return "cpu"

    monkeypatch.setattr(backend.jax, "default_backend", default_backend)
    monkeypatch.setattr(gpu_driver, "version", lambda: "550.54.15")
    monkeypatch.setattr(gpu_driver, "plugins", lambda: {13: "1.2"})
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    with pytest.raises(ConfigError, match=r"asks for cuda.*driver is 550.54.15.*needs 580"):
        backend.check_platform()


@pytest.mark.parametrize("driver", ["524.9", "525.0", "579.1", "580.0", "700.1"])
def test_launchers_choose_as_the_trainer_advises(driver):
    command = ["bash", "-c", f"source launch/nvidia.sh; cuda_of_driver {driver}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    fitting = [
        str(cuda)
        for cuda, oldest in gpu_driver.OLDEST_DRIVER.items()
        if int(driver.split(".")[0]) >= oldest
    ]
    assert done.stdout.split() == fitting[-1:]
    assert (done.returncode == 0) == bool(fitting)
