"""launch/setup.sh with stand-ins for Python, pip and nvidia-smi; --help of all launchers."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from tests.trainer import ROOT

JAX = "jax==1.2.3"
# Makes environments whose `python` notes what pip is asked to do.
PYTHON = """#!/usr/bin/env bash
case $* in
-c*) ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*)
    echo "$@" >>"$CALLS"
    if [ "$FAILS" ]; then exit 1; fi
    if [ "$SLOW" ]; then sleep 1; fi
    ;;
esac
"""
SMI = """#!/usr/bin/env bash
if [ ! "$DRIVER" ]; then echo "NVIDIA-SMI has failed"; exit 9; fi
echo "$DRIVER"; echo "$DRIVER" # a line a GPU
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the launchers with requirements of its own; `checkout(...)` runs setup.sh there."""
    root, bin_folder, calls = tmp_path / "my checkout", tmp_path / "bin", tmp_path / "calls"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "requirements.txt").write_text(f"{JAX} # arrays\nflax==1\n")
    bin_folder.mkdir()
    for name, text in (("python3", PYTHON), ("nvidia-smi", SMI)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)

    def start(*arguments, **settings):
        path = f"{bin_folder}:{os.environ['PATH']}"
        own = {"DRIVER": "", "FAILS": "", "SLOW": "", "JAX_PLATFORMS": ""} | settings
        return subprocess.Popen(
            [root / "launch/setup.sh", *arguments], cwd=tmp_path, text=True,
            env=os.environ | {"PATH": path, "CALLS": str(calls)} | own,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(*arguments, code=0, **settings):
        """What pip was asked to do, and what was said."""
        calls.write_text("")
        process = start(*arguments, **settings)
        said = "".join(process.communicate(timeout=60))
        assert process.returncode == code, said
        return installed(), said

    def installed():
        lines = calls.read_text().splitlines()
        return [line.rpartition(" ")[2] for line in lines if " install " in line]

    run.root, run.start, run.installed, run.calls = root, start, installed, calls
    return run


def test_once_and_when_requirements_change(checkout):
    requirements = checkout.root / "requirements.txt"
    asked, said = checkout()
    assert checkout.calls.read_text().rstrip().endswith(f"-r {requirements}")
    assert len(asked) == 1
    assert "CUDA" not in said
    assert "cuda" not in said
    assert checkout() == ([], "")
    requirements.write_text(f"{JAX}\nflax==2\n")
    assert len(checkout()[0]) == 1


@pytest.mark.parametrize(
    ("driver", "plugin"),
    [
        ("525.60.13", "jax[cuda12]==1.2.3"),
        ("579.99", "jax[cuda12]==1.2.3"),
        ("580.65.06", "jax[cuda13]==1.2.3"),
        ("1000.1", "jax[cuda13]==1.2.3"),
    ],
)
def test_the_plugin_follows_from_the_driver(checkout, driver, plugin):
    asked, said = checkout(DRIVER=driver)
    assert asked[1:] == [plugin]
    assert f"Installing {plugin}" in said
    assert driver in said
    assert checkout(DRIVER=driver) == ([], "")


def test_too_old_a_driver_is_named(checkout):
    asked, said = checkout(DRIVER="470.57.02")
    assert len(asked) == 1
    assert "driver 470.57.02 is older than 525" in said


@pytest.mark.parametrize(
    ("platforms", "installs"), [("cpu", 0), ("tpu,cpu", 0), ("cuda,cpu", 1), ("gpu", 1)]
)
def test_gpus_that_are_not_to_be_used(checkout, platforms, installs):
    checkout()
    assert len(checkout(DRIVER="580.1", JAX_PLATFORMS=platforms)[0]) == installs


def test_a_gpu_that_comes_later(checkout):
    """As on clusters, whose login node has none."""
    checkout()
    assert checkout(DRIVER="580.1")[0] == ["jax[cuda13]==1.2.3"]
    assert checkout() == ([], "")
    assert checkout(DRIVER="580.1") == ([], "")


def test_nodes_with_other_drivers_agree_on_the_older_cuda(checkout):
    checkout(DRIVER="580.1")
    asked, _ = checkout(DRIVER="550.1")
    assert asked == ["jax[cuda12]==1.2.3"]
    removed = next(line for line in checkout.calls.read_text().splitlines() if "uninstall" in line)
    assert {"jax-cuda13-plugin", "jax-cuda13-pjrt"} < set(removed.split())
    assert checkout(DRIVER="580.1") == ([], "")


def test_the_plugin_is_of_the_same_version_as_jax(checkout):
    checkout(DRIVER="580.1")
    (checkout.root / "requirements.txt").write_text("jax==1.3.0\n")
    assert checkout(DRIVER="580.1")[0][1:] == ["jax[cuda13]==1.3.0"]


def test_it_can_be_asked_for_without_a_gpu(checkout):
    assert checkout("--cuda=12")[0][1:] == ["jax[cuda12]==1.2.3"]
    assert checkout(DRIVER="580.1") == ([], "")
    assert checkout("--cuda=13")[0] == ["jax[cuda13]==1.2.3"]


def test_failures_are_not_taken_for_success(checkout):
    _, said = checkout(FAILS="yes", code=1)
    assert "pip failed" in said
    assert "no internet" in said
    assert len(checkout()[0]) == 1
    assert "pip failed" in checkout(FAILS="yes", DRIVER="580.1", code=1)[1]
    assert checkout(DRIVER="580.1")[0] == ["jax[cuda13]==1.2.3"]


def test_a_launcher_that_sources_it_ends_with_it(checkout, tmp_path):
    """Even within a condition of bash, where `set -e` has no effect."""
    launcher = checkout.root / "launch/other.sh"
    text = 'set -e\nstart() { source "$(dirname "$0")/setup.sh"; echo started "$python"; }\n'
    launcher.write_text(text + "if ! start; then echo failed; fi\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for fails, out in (("yes", ""), ("", f"started {checkout.root}/.venv/bin/python")):
        own = {"PATH": path, "CALLS": str(checkout.calls), "FAILS": fails, "DRIVER": "", "SLOW": ""}
        done = subprocess.run(
            ["bash", launcher], env=os.environ | own, capture_output=True, text=True
        )
        assert (done.returncode, out in done.stdout) == (1 if fails else 0, True)
        assert "failed\n" not in done.stdout
        assert ("started" in done.stdout) == (not fails)


def test_one_process_installs_and_others_wait(checkout):
    checkout.calls.write_text("")
    processes = [checkout.start(SLOW="yes", DRIVER="580.1") for _ in range(4)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(checkout.installed()) == 2  # requirements.txt and the plugin
    assert sum("Waiting for another process" in text for text in said) == 3


def test_a_killed_installation_blocks_nothing(checkout):
    checkout.calls.write_text("")
    process = checkout.start(SLOW="yes")
    while not checkout.calls.read_text():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(checkout()[0]) == 1


VERSIONS = [
    ("NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
    ("NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)", "580.65.06"),
    ("NVIDIA UNIX Open Kernel Module for aarch64  580.65  Release Build", "580.65"),
]


@pytest.mark.parametrize(("text", "version"), VERSIONS)
def test_the_driver_without_nvidia_smi(tmp_path, text, version):
    (tmp_path / "version").write_text(f"NVRM version: {text}\nGCC version:  gcc version 12.3.0\n")
    script = 'source launch/nvidia.sh; nvidia_driver "$0"'
    for file, expected in ((tmp_path / "version", f"{version}\n"), (tmp_path / "none", "")):
        command = ["env", "PATH=/bin:/usr/bin", "bash", "-c", script, file]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, expected)


LAUNCHERS = ["local", "test", "setup", "slurm", "docker_gpu", "supervise", "tpu_pod"]


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_needs_nothing_and_does_nothing(tmp_path, name, flag):
    """On a machine with bash and the standard commands only."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    before = sorted(tmp_path.rglob("*"))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for command in ("bash", "env", "sed", "dirname", "cat"):
        (bin_folder / command).symlink_to(shutil.which(command))
    done = subprocess.run(
        [tmp_path / f"launch/{name}.sh", flag],
        env={"PATH": str(bin_folder)}, cwd="/", capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{name}.sh" in done.stdout
    assert "SBATCH --" not in done.stdout
    shutil.rmtree(bin_folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_all_launchers_are_listed():
    executable = {
        p.stem for p in pathlib.Path(ROOT / "launch").glob("*.sh") if os.access(p, os.X_OK)
    }
    assert executable == set(LAUNCHERS)


@pytest.mark.parametrize("arguments", [["--cuda=11"], ["--cuda=12", "--help"], ["x"]])
def test_mistakes_are_named(checkout, arguments):
    asked, said = checkout(*arguments, code=2)
    assert asked == []
    assert f"unexpected {' '.join(arguments)}; see --help" in said
