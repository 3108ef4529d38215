"""The Dockerfile and launch/docker_gpu.sh, without an engine.

The steps of the Dockerfile are replayed in a folder that stands for the image's root: the quick
tests only copy the code; the slow one runs everything, in an environment of its own.
"""

import csv
import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from packaging.requirements import Requirement

from tests.test_packaging import EXTRAS
from tests.trainer import ROOT

VENV = pathlib.Path(sys.executable).parent


def stages():
    """{stage: (what it starts from, [(instruction, its text), ...])} of the Dockerfile."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.split()
            found[name] = parent, []
        elif line:
            found[name][1].append((instruction, rest.strip()))
    return found


def steps(target):
    """All instructions of a target, those of the stages that it starts from first."""
    known = stages()
    parent, own = known[target]
    return (steps(parent) if parent in known else []) + own


def is_ignored(path):
    """Whether .dockerignore keeps a path, relative to the root, from the builder: last match."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parts = pathlib.PurePath(path).parts
            starts = range(len(parts)) if "**/" in line else (0,)
            heads = ["/".join(parts[s:e]) for s in starts for e in range(s + 1, len(parts) + 1)]
            if any(fnmatch.fnmatchcase(head, pattern) for head in heads):
                ignored = not line.startswith("!")
    return ignored


def copy(source, target):
    """COPY, from the context."""
    if (ROOT / source).is_file():
        assert not is_ignored(source)
        return shutil.copy(ROOT / source, target)
    files = [f for f in (ROOT / source).rglob("*") if f.is_file()]
    sent = [f.relative_to(ROOT / source) for f in files if not is_ignored(f.relative_to(ROOT))]
    assert sent, f"COPY {source} copies nothing"
    for file in sent:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source / file, target / file)
    return target


class Image:
    """What a target of the Dockerfile makes, in a folder that stands for /.

    With `run`, also its RUN steps, in a virtual environment that stands for the base image's
    Python.
    """

    def __init__(self, root, target, run=False):
        self.root, self.env, self.entry_point, self.user = root, {}, [], "root"
        self.path = [root / "bin", VENV]
        if run:
            base = pathlib.Path(sys.base_prefix) / "bin/python3"
            subprocess.run([base, "-m", "venv", root / "usr/local"], check=True)
            self.path[1] = root / "usr/local/bin"
        (root / "bin").mkdir(parents=True)
        (root / "bin/useradd").symlink_to("/bin/true")  # nobody is added to this machine
        self.workdir = root
        for instruction, text in steps(target):
            if instruction == "ENV":
                self.env |= dict(pair.split("=", 1) for pair in shlex.split(text))
            elif instruction == "WORKDIR":
                self.workdir = self.at(text)
                self.workdir.mkdir(parents=True)
            elif instruction == "COPY" and "--from=" not in text:
                *sources, to = text.split()
                for source in sources:
                    copy(source, self.workdir / to)
            elif instruction == "COPY":
                _, source, _ = text.split()
                assert source == "/"
                stage = text.partition("--from=")[2].split()[0]
                for kind, copied in stages()[stage][1]:
                    assert kind == "COPY"
                    origin, to = copied.split()
                    copy(origin, self.workdir / to.lstrip("/"))
            elif instruction == "RUN" and run:
                text = re.sub(r"(?<=\s)/(home|workdir)\b", rf"{root}/\1", text)
                self.call(["sh", "-ec", text], check=True)
            elif instruction == "ENTRYPOINT":
                self.entry_point = json.loads(text)
            elif instruction == "USER":
                self.user = text
            else:
                assert instruction in ("LABEL", "RUN"), instruction

    def at(self, path):
        return self.root / path.lstrip("/")

    def call(self, command, **options):
        home = self.at(self.env["HOME"])
        home.mkdir(parents=True, exist_ok=True)
        settings = self.env | {
            "HOME": str(home),
            "PATH": ":".join(map(str, [*self.path, "/usr/bin", "/bin"])),
        }
        kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_"))}
        return subprocess.run(command, cwd=self.workdir, env=kept | settings, **options)

    def run(self, *arguments):
        """`docker run IMAGE ARGUMENTS`; returns the finished process."""
        return self.call([*self.entry_point, *arguments], capture_output=True, text=True)


def test_hadolint_has_no_complaints():
    done = subprocess.run([VENV / "hadolint", "Dockerfile"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_an_image_is(target):
    """A pinned base; the user isn't root; signals reach the entry point; code comes last."""
    done = steps(target)
    kinds = [instruction for instruction, _ in done]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", stages()["base"][0])
    assert dict(done)["USER"] not in ("root", "0")
    assert json.loads(dict(done)["ENTRYPOINT"])  # a list: no shell between
    code = next(i for i, (_, text) in enumerate(done) if text.startswith("--from=code"))
    assert "RUN" not in kinds[code:]  # changed code installs nothing again
    environment = dict(pair for kind, text in done if kind == "ENV" for pair in pairs(text))
    local = re.findall(r"(MALLOC_\w+)=\$\{\1:-(\d+)\}", (ROOT / "launch/local.sh").read_text())
    assert local
    assert dict(local).items() <= environment.items()
    assert environment.get("JAX_PLATFORMS") == ("cuda,cpu" if target == "cuda" else None)


def pairs(text):
    return [pair.split("=", 1) for pair in shlex.split(text)]


def test_images_have_the_pinned_jax_and_no_tests():
    requirements = (ROOT / "requirements.txt").read_text()
    jax = re.search(r"^jax==(\S+)", requirements, re.MULTILINE)[1]
    installs = [text for kind, text in steps("cuda") if kind == "RUN" and "pip install" in text]
    assert f'"jax[cuda${{CUDA}}]=={jax}"' in installs[-1]
    assert ("ARG", "CUDA=13") in steps("cuda")
    (wandb,) = re.findall(r"wandb==([\d.]+)", installs[0])
    (allowed,) = map(Requirement, EXTRAS["wandb"])
    assert allowed.specifier.contains(wandb)
    (cut,) = re.findall(r"sed '(\S.*?)' requirements.txt", installs[0])
    command = ["sed", cut, ROOT / "requirements.txt"]
    kept = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    dropped = re.findall(r"^[\w-]+(?==)", requirements.removeprefix(kept), re.MULTILINE)
    assert requirements.startswith(kept)
    assert requirements.count("\n# --- ") == kept.count("\n# --- ") + 1  # the section of tests
    assert {"pytest", "ruff"} < set(dropped)
    assert f"jax=={jax}" in kept


@pytest.mark.parametrize(("cuda", "code"), [("12", 0), ("13", 0), ("11", 1), ("", 1)])
def test_the_build_argument_is_checked(tmp_path, cuda, code):
    """pip would only warn of an extra that JAX does not have, and install it for CPUs."""
    (install,) = [t for kind, t in steps("cuda") if kind == "RUN" and "$CUDA" in t]
    (tmp_path / "pip").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA": cuda}
    done = subprocess.run(
        ["sh", "-ec", install], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr == f"--build-arg CUDA={cuda}: 12 or 13\n"
    else:
        assert done.stdout.splitlines()[-1].startswith(f"jax[cuda{cuda}]==")


def test_the_builder_gets_nothing_but_the_code():
    secrets = ("key.json", ".env", ".git/config", "runs/1/config.json", "tests/conftest.py")
    build = (".venv/bin/python", "tools/__pycache__/gke.pyc", "spectral_pod/ops/__pycache__/x.pyc")
    for path in (*secrets, *build, "docs/todo.md"):
        assert is_ignored(path), path
    for path in ("requirements.txt", "configs/quickstart.py", "spectral_pod/ops/fft.py"):
        assert not is_ignored(path), path


def test_the_copied_code_starts(tmp_path):
    """From what is copied alone: a mistake is the trainer's message, and not tried again."""
    image = Image(tmp_path / "image", "cpu")
    done = image.run("--config=configs/quickstart.py", "--workdir=w", "--config.model.hiden_dim=3")
    assert done.returncode == 2, done.stderr
    assert "hiden_dim" in done.stderr
    assert "did you mean 'hidden_dim'" in done.stderr
    assert "supervise" not in done.stderr
    done = image.call(["python", "-m", "tools.gke", "--help"], capture_output=True)
    assert done.returncode == 0  # tools find their templates in the image
    assert image.at("spectral_pod/tools/gke_jobset.yaml").exists()


@pytest.mark.slow
def test_the_image_trains(tmp_path):
    """Every step of the target `cpu`, then a short quickstart, with only what those installed."""
    image = Image(tmp_path / "image", "cpu", run=True)
    done = image.run(
        "--config=configs/quickstart.py", f"--workdir={image.at('/workdir')}",
        "--config.train.total_steps=2", "--config.train.eval_every_steps=2",
        "--config.checkpoint.every_steps=2", "--config.optimizer.warmup_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((image.at("/workdir") / "result.json").read_text())["eval"]
    assert image.call(["python", "-c", "import pytest"], capture_output=True).returncode == 1


DOCKER = """#!/usr/bin/env bash
trap 'kill $!; exit 75' TERM
printf '%s\\0' "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
if [ "$WAIT" ]; then sleep 60 & wait; fi
"""


@pytest.fixture
def docker(tmp_path):
    """A stand-in that notes how it is called; `docker(...)` runs launch/docker_gpu.sh with it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/docker").write_text(DOCKER)
    (tmp_path / "bin/docker").chmod(0o755)
    (tmp_path / "bin/nvidia-smi").write_text('#!/bin/sh\necho "$DRIVER"; test "$DRIVER"\n')
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    calls = tmp_path / "calls"

    def start(*arguments, wait="", **environment):
        calls.write_text("")
        unset = ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG", "DRIVER")
        inherited = {k: v for k, v in os.environ.items() if k not in unset}
        own = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls),
            "HOME": str(tmp_path / "home"),
        }  # fmt: skip
        return subprocess.Popen(
            [ROOT / "launch/docker_gpu.sh", *arguments], cwd=tmp_path, text=True,
            env=inherited | own | {"WAIT": wait} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(*arguments, code=0, **environment):
        process = start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        called = [line.split("\0")[:-1] for line in calls.read_text().split("\n")[:-1]]
        return called, out, err

    run.start, run.calls = start, calls
    return run


def mounts(call):
    """{target: (source, other fields)} of the options of `docker run`."""
    values = [option.removeprefix("--mount=") for option in call if option.startswith("--mount=")]
    found = {}
    for kind, source, target, *others in csv.reader(values):
        assert kind == "type=bind"
        found[target.removeprefix("target=")] = source.removeprefix("source="), others
    return found


def test_one_machine(docker, tmp_path):
    (call,), _, _ = docker("--workdir=my run", "--data=d", "--", "--config=x.py", "--config.a=b c")
    options, flags = (
        call[: call.index("spectral_pod:cuda")],
        call[call.index("spectral_pod:cuda") + 1 :],
    )
    assert options[0] == "run"
    assert {"--rm", "--gpus=all", "--ulimit=memlock=-1"} < set(options)
    assert f"--user={os.getuid()}:{os.getgid()}" in options
    folders = [str(tmp_path / name) for name in ("my run", "d")]
    mounted = mounts(options)
    assert {folder: mounted[folder] for folder in folders} == {f: (f, []) for f in folders}
    assert all(map(os.path.isdir, folders))  # Docker would make them, for root
    (stop,) = [o for o in options if o.startswith("--stop-timeout=")]
    assert int(stop.partition("=")[2]) > 30
    assert any(o.startswith("--shm-size=") for o in options)
    assert not [o for o in options if o.startswith(("--network", "--env"))]
    assert flags == [
        f"--workdir={tmp_path}/my run", f"--config.data.dir={tmp_path}/d", "--config=x.py",
        "--config.a=b c",
    ]  # fmt: skip


def test_the_user_and_all_groups_have_names(docker):
    (call,), _, _ = docker("--workdir=gs://b/r", "--", "--config=x.py")
    known = {}
    for kind in ("passwd", "group"):
        source, others = mounts(call)[f"/etc/{kind}"]
        assert others == ["readonly"]
        lines = pathlib.Path(source).read_text().splitlines()
        known[kind] = {int(line.split(":")[2]) for line in lines}
    assert {0, os.getuid()} == known["passwd"]
    assert {os.getgid(), *os.getgroups()} == known["group"]


def test_a_bucket_and_credentials(docker, tmp_path):
    key = tmp_path / 'the "key", mine.json'
    key.write_text("{}")
    (call,), _, _ = docker(
        "--image=reg/i:2", "--workdir=gs://b/r", "--", "--config=x.py",
        GOOGLE_APPLICATION_CREDENTIALS=key.name,
    )  # fmt: skip
    assert mounts(call)[str(key)] == (str(key), ["readonly"])
    assert f"--env=GOOGLE_APPLICATION_CREDENTIALS={key}" in call
    assert call[call.index("reg/i:2") + 1 :] == ["--workdir=gs://b/r", "--config=x.py"]


def test_several_nodes_share_the_hosts_network(docker):
    flags = ["--config=x", "--coordinator_address=h:1", "--num_processes=2", "--process_id=0"]
    (call,), _, _ = docker("--workdir=gs://b/r", "--", *flags)
    assert "--network=host" in call
    assert call[-4:] == flags


def test_build_and_dry_run(docker, tmp_path):
    arguments = ["--build", "--workdir=a 'b", "--", "--config=x.py", '--config.a={"b": "$c"}']
    called, _, _ = docker(*arguments)
    assert [call[0] for call in called] == ["build", "run"]
    assert called[0] == [
        "build", "--target=cuda", "--build-arg=CUDA=13", "--tag=spectral_pod:cuda", str(ROOT),
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "a 'b")
    nothing, printed, _ = docker("--dry_run", *arguments)
    assert (nothing, list(tmp_path.glob("a*"))) == ([], [])
    assert [shlex.split(line)[1:] for line in printed.splitlines()] == called


@pytest.mark.parametrize(
    ("options", "driver", "cuda"),
    [
        (["--cuda=12"], "580.1", "12"),
        (["--cuda=13"], "550.1", "13"),
        ([], "550.54.15", "12"),
        ([], "580.65.06", "13"),
        ([], "470.1", "13"),
        ([], "", "13"),
    ],
)
def test_the_cuda_of_an_image(docker, options, driver, cuda):
    arguments = ["--build", *options, "--workdir=gs://b/r", "--", "--config=x.py"]
    (build, _), _, _ = docker(*arguments, DRIVER=driver)
    assert f"--build-arg=CUDA={cuda}" in build


def test_environment(docker):
    """Values that are in the environment stay there."""
    arguments = ["--env=A=b c=d", "--env=SECRET", "--workdir=gs://b/r", "--", "--config=x.py"]
    (call,), _, _ = docker(*arguments, SECRET="hush")
    assert [o for o in call if o.startswith("--env")] == ["--env=A=b c=d", "--env=SECRET"]
    _, printed, _ = docker("--dry_run", *arguments, SECRET="hush")
    assert "'--env=SECRET'" in printed
    assert "hush" not in printed


def test_the_default_credentials(docker, tmp_path):
    """Those of gcloud, unless others are named."""
    for folder, environment in (
        (tmp_path / "home/.config/gcloud", {}),
        (tmp_path / "my gcloud", {"CLOUDSDK_CONFIG": str(tmp_path / "my gcloud")}),
    ):
        folder.mkdir(parents=True)
        default = folder / "application_default_credentials.json"
        default.write_text("{}")
        (call,), _, _ = docker("--workdir=gs://b/r", "--", "--config=x.py", **environment)
        assert mounts(call)[str(default)] == (str(default), ["readonly"])
        assert f"--env=GOOGLE_APPLICATION_CREDENTIALS={default}" in call
    key = tmp_path / "key.json"
    key.write_text("{}")
    named = {"GOOGLE_APPLICATION_CREDENTIALS": str(key)}
    (call,), _, _ = docker("--workdir=gs://b/r", "--", "--config=x.py", **named)
    assert f"--env=GOOGLE_APPLICATION_CREDENTIALS={key}" in call
    assert str(default) not in mounts(call)


def test_signals_reach_docker(docker):
    process = docker.start("--workdir=gs://b/r", "--", "--config=x.py", wait="yes")
    while not docker.calls.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


RUN = ("--workdir=w", "--", "--config=x")
MISTAKES = [
    (("--workdir=w",), "trainer's flags"),
    (("--workdir=w", "--"), "trainer's flags"),
    (("--", "--config=x"), "--workdir is missing"),
    (("--config=x", "--", "--config=x"), "unexpected argument --config=x"),
    (("--build", "--cuda=11", *RUN), "--cuda=11; it is 12 or 13"),
    (("--cuda=12", *RUN), "--cuda is for --build"),
    (("--env=1x=3", *RUN), "--env=1x=3; write --env=NAME=VALUE"),
    (("--env=ABSENT", *RUN), "ABSENT is not in the environment"),
    (("--env=image", *RUN), "image is not in the environment"),  # a variable of the script
    (("--image=My/Image", *RUN), "lower case"),
    (("--image=registry:5000/image:", *RUN), "NAME:TAG"),
    (("--image=x:" + 129 * "a", *RUN), "128 characters"),
]


@pytest.mark.parametrize(("arguments", "complaint"), MISTAKES)
def test_mistakes_are_named(docker, arguments, complaint):
    called, _, said = docker(*arguments, code=2)
    assert called == []
    assert complaint in said


def test_missing_credentials_are_named(docker):
    missing = {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/key.json"}
    called, _, said = docker("--workdir=gs://b/r", "--", "--config=x", code=2, **missing)
    assert called == []
    assert "/nowhere/key.json" in said
