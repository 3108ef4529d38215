"""pyproject.toml, requirements.txt and the Dockerfile agree, and the wheel can train."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def by_name(lines):
    return {canonicalize_name(r.name): r for r in map(Requirement, lines) if "jax[" not in str(r)}


def pinned():
    text = re.sub(r"\s*#.*", "", (ROOT / "requirements.txt").read_text())
    return by_name(line for line in text.splitlines() if line)


def ranges():
    lines = list(PROJECT["dependencies"])
    for extra in ("tpu", "tensorflow", "dev"):
        lines += EXTRAS[extra]
    return by_name(lines)


def test_both_lists_have_the_same_packages():
    assert pinned().keys() == ranges().keys()


@pytest.mark.parametrize("name", sorted(ranges()))
def test_pins_are_within_the_ranges(name):
    pin, allowed = pinned()[name], ranges()[name]
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert allowed.specifier.contains(specifier.version)
    assert (str(pin.marker), pin.extras) == (str(allowed.marker), allowed.extras)


def test_jax_of_a_gpu_machine_is_allowed():
    """Python 3.12 has JAX 0.11; JAX 0.10 is the last for Python 3.11."""
    seen = {"jax": "0.11.2", "flax": "0.12.10", "optax": "0.2.8", "orbax-checkpoint": "0.12.4"}
    assert all(ranges()[name].specifier.contains(version) for name, version in seen.items())
    assert ranges()["jaxlib"].specifier == ranges()["jax"].specifier
    for extra in ("tpu", "cuda12", "cuda13"):
        jax = Requirement(EXTRAS[extra][0])
        assert (jax.name, jax.extras) == ("jax", {extra})
        assert jax.specifier == ranges()["jax"].specifier


def test_python_versions():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert PROJECT["requires-python"] == f">={tools['mypy']['python_version']}"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def resolve(*arguments):
    """Resolves requirements with uv, without installing; the finished process."""
    uv = pathlib.Path(sys.executable).with_name("uv")
    platform = "x86_64-manylinux_2_31"  # libtpu's wheels need a glibc of 2.31
    command = [uv, "pip", "compile", "--no-progress", f"--python-platform={platform}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def package_index(tmp_path_factory):
    """Skips where none answers; nothing else here needs the internet."""
    file = tmp_path_factory.mktemp("index") / "requirements.in"
    file.write_text("absl-py\n")
    if (done := resolve("--no-cache", str(file))).returncode:
        pytest.skip(f"no package index answers: {done.stderr.splitlines()[0]}")


PYTHONS = ("3.11", "3.12", "3.13")
JAX = ("0.10", "0.11", "0.12")


def has_version(text, name, version):
    return re.search(rf"^{name}=={re.escape(version)}\.", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_pins_can_be_installed(package_index, python):
    done = resolve(f"--python-version={python}", "requirements.txt")
    assert done.returncode == 0, done.stderr
    assert has_version(done.stdout, "jax", "0.10")


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["cuda12", "cuda13"])
@pytest.mark.parametrize("jax", JAX)
@pytest.mark.parametrize("python", PYTHONS)
def test_ranges_can_be_installed(package_index, tmp_path, python, jax, cuda):
    """All extras together, for every Python and JAX; from JAX 0.11 on there is none for 3.11."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"jax=={jax}.*\n")
    extras = [f"--extra={extra}" for extra in EXTRAS if not extra.startswith("cuda")]
    where = (f"--python-version={python}", f"--constraint={constraints}", f"--extra={cuda}")
    done = resolve(*where, *extras, "pyproject.toml")
    if python == "3.11" and jax != "0.10":
        assert done.returncode
        assert "depends on Python>=3.12" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    for name in ("jax", "jaxlib", f"jax-{cuda}-plugin"):
        assert has_version(done.stdout, name, jax)


@pytest.mark.slow
@pytest.mark.parametrize(("python", "jax"), [("3.12", "0.11.0"), ("3.13", "0.12.*")])
def test_operations_and_training_with_another_python(package_index, tmp_path, python, jax):
    """In an environment of its own: the quick tests of operations, and a few steps on a CPU."""
    uv, there = pathlib.Path(sys.executable).with_name("uv"), tmp_path / "venv/bin/python"
    done = subprocess.run(
        [uv, "venv", f"--python={python}", tmp_path / "venv"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no Python {python} here or to download: {done.stderr.splitlines()[0]}")
    # As a wheel, so that nothing is written to the repository.
    install = [uv, "pip", "install", "--quiet", f"--python={there}", f"{ROOT}[dev]"]
    subprocess.run([*install, f"jax=={jax}"], check=True)
    of_tests = ("PYTEST_", "SPECTRAL_POD_", "JAX_", "XLA_", "PJRT_")  # as a user has none
    environment = {k: v for k, v in os.environ.items() if not k.startswith(of_tests)}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}

    def run(*command):
        done = subprocess.run(
            [there, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=3600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    run(
        "spectral_pod.main", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run",
        "--config.train.total_steps=20", "--config.optimizer.warmup_steps=1",
    )  # fmt: skip
    run("pytest", "-n1", "tests/ops")


def test_python_versions_are_those_that_are_resolved():
    named = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if "Python :: 3" in line]
    assert tuple(named) == PYTHONS


@pytest.mark.slow
def test_a_wheel_trains_from_another_folder(tmp_path):
    """Uses the packages of this environment; CONTRIBUTING.md has the check in a clean one."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", f"--target={site}", str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path),
    }  # fmt: skip

    def run(*command):
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(
        site / "bin/spectral-pod", "--config=configs/quickstart.py", "--workdir=run",
        "--config.train.total_steps=2", "--config.train.eval_every_steps=2",
        "--config.checkpoint.every_steps=2", "--config.optimizer.warmup_steps=1",
    )  # fmt: skip
    assert json.loads((elsewhere / "run/result.json").read_text())["eval"]
    status = run(sys.executable, "-m", "spectral_pod.tools.status", "run")
    assert "finished" in status
    usage = run(sys.executable, "-m", "spectral_pod.tools.gke", "--help")
    assert usage.startswith("usage: python -m spectral_pod.tools.gke")
    job = run(
        sys.executable, "-m", "spectral_pod.tools.gke", "--name=a", "--image=i",
        "--workdir=gs://b/r", "--topology=v4-8", "--", "--config=configs/lra_text.py",
    )  # fmt: skip
    assert "kind: JobSet" in job
