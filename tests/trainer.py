"""Runs the trainer as a user does: `python -m spectral_pod.main` in processes of its own.

This file is also the config of those runs, `--config=tests/trainer.py`: a complete run, as small as
one can be.
"""

import fcntl
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types
import urllib.request

from ml_collections import ConfigDict

from spectral_pod.config import default
from tests import processes

ROOT = processes.ROOT


def get_config() -> ConfigDict:
    if step := os.environ.get("TIME_IS_UP_AT"):
        _time_is_up_at(int(step))
    c = default()
    c.data.task = "listops"
    c.data.options = ConfigDict({"train": 64, "validation": 16, "test": 16, "num_workers": 1})
    c.data.seq_len = 256
    c.data.truncate = True  # the records have 500 to 2,000 bytes
    c.model.dtype = "float32"
    c.model.num_layers = 1
    c.model.memory_interval = 0  # half of the time to trace and compile
    c.model.hidden_dim = 16
    c.model.embed_dim = 8
    c.model.memory.head_dim = 8
    c.model.dropout = 0.1  # so that a step depends on its random numbers
    c.train.total_steps = 40
    c.train.global_batch_size = 8
    c.train.grad_accumulation = 2
    c.train.eval_batch_size = 16
    c.train.eval_every_steps = 20
    c.train.compilation_cache = False  # that of all tests is used instead
    c.train.log_every_steps = 2  # two windows of steps and one cut short by each checkpoint
    c.checkpoint.every_steps = 5
    c.optimizer.warmup_steps = 5
    return c


def _time_is_up_at(step):
    """The clock of --stop_after_minutes strikes once this many steps of the run are taken."""
    from spectral_pod.data import pipeline
    from spectral_pod.parallel import runtime

    load = pipeline.load

    def timed_load(source, sharding, start, stop, **options):
        for i, batch in enumerate(load(source, sharding, start, stop, **options), start):
            if i == step:
                runtime.preemption._on_time()
            yield batch

    pipeline.load = timed_load


def config(**fields):
    """This config with other values, as in `config(train__total_steps=5)`."""
    c = get_config()
    c.data.dir = str(home() / "data")
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return c


@functools.cache
def home() -> pathlib.Path:
    """A folder for what the tests of this process share, such as the data."""
    folder = tempfile.TemporaryDirectory(prefix="spectral_pod-")
    home.folder = folder  # removed with this reference, when the process ends
    return pathlib.Path(folder.name)


def command(workdir, *overrides, config="tests/trainer.py"):
    overrides = [f"--config.{override}" for override in overrides]
    return [
        sys.executable, "-m", "spectral_pod.main", f"--config={config}", f"--workdir={workdir}",
        f"--config.data.dir={home() / 'data'}", *overrides,
    ]  # fmt: skip


def environment(tensorflow=False):
    """The environment of tests' processes; without TensorFlow, which takes seconds to import."""
    path = {"PYTHONPATH": str(ROOT)} if tensorflow else {}
    return processes.environment() | path | {"PJRT_NPROC": "16", "XLA_FLAGS": processes.xla_flags()}


def run(arguments, code=0, *, tensorflow=False, forked=True, timeout=300):
    """Runs a command to its end, which must be `code`; returns what it printed.

    Not `forked`, the interpreter is started as a user's shell does; so it is with TensorFlow.
    """
    start = processes.run if forked and not tensorflow else subprocess.run
    done = start(
        arguments, cwd=ROOT, env=environment(tensorflow), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(arguments, log, *, forked=True):
    """Starts a command whose output goes to the file `log`."""
    popen = processes.Popen if forked else subprocess.Popen
    with open(log, "w") as file:
        return popen(arguments, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)


@functools.cache
def uninterrupted(*overrides):
    """The workdir of an undisturbed run, which the tests of all workers read and none changes."""
    shared = pathlib.Path(os.environ["SPECTRAL_POD_TESTS"])
    workdir = shared / "-".join(["uninterrupted", *overrides])
    with open(f"{workdir}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "result.json").exists():
            run(command(workdir, *overrides), forked=False)
    return workdir


def contents(folder):
    """The bytes of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(file, change):
    """Changes a JSON file of the project as its older versions would, without a checksum."""
    content = json.loads(file.read_text())
    content.pop("checksum", None)
    change(content)
    file.write_text(json.dumps(content))


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


def metrics(workdir):
    """Every line of `metrics.jsonl`."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def curves(workdir):
    """Every line of `metrics.jsonl`, without what depends on the machine's speed."""
    return [{k: v for k, v in line.items() if not is_timing(k)} for line in metrics(workdir)]


def is_timing(name):
    """Whether a metric depends on the machine's speed, by its name in lines or in TensorBoard."""
    measured = ("speed/", "time_share/", "goodput/", "host/", "system/", "time/", "time_of_hosts/")
    return name == "wall_time" or name.startswith(measured)


def event_accumulators(workdir):
    """TensorBoard's reader of each run in a workdir, by the run's name."""
    # With this, TensorBoard reads files by itself; importing TensorFlow takes seconds.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    # The one that TensorBoard uses; another, older one does not drop points of repeated steps.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    runs = {}
    for folder in sorted({file.parent for file in workdir.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
        events.Reload()
        runs[folder.relative_to(workdir).as_posix()] = events
    return runs


def event_points(workdir):
    """{(run, tag): {step: value}} of all event files in a workdir; of several values the last."""
    from tensorboard.util import tensor_util

    points = {}
    for run, events in event_accumulators(workdir).items():
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                value = tensor_util.make_ndarray(event.tensor_proto).item()
                points.setdefault((run, tag), {})[event.step] = (
                    value.decode() if isinstance(value, bytes) else value
                )
    return points


def tensorboard_tags(command, runs, **options):
    """What the server of TensorBoard, started by a command, shows: {run: {tag: about it}}."""
    tags = {}
    server = subprocess.Popen([*command, "--port=0"], stderr=subprocess.PIPE, text=True, **options)
    try:
        address = next(filter(None, (re.search(r"http://\S+", line) for line in server.stderr)))
        for _ in range(120):  # it reads the files in the background
            url, before = f"{address[0]}data/plugin/scalars/tags", tags
            with urllib.request.urlopen(url, timeout=60) as answer:
                tags = json.load(answer)
            if tags == before and set(runs) <= tags.keys():
                return tags
            time.sleep(0.5)
        raise AssertionError(f"{command} shows {tags}")
    finally:
        server.terminate()
        server.communicate()


def assert_same_run(workdir, reference):
    """The same parameters, to the bit, and the same curves, every point once."""
    assert result(workdir)["params_digest"] == result(reference)["params_digest"]
    assert result(workdir)["eval"] == result(reference)["eval"]
    assert curves(workdir) == curves(reference)
    points, expected = (
        # The text "config" has the folder of the data, which every worker of the tests has.
        {
            (name, tag): curve
            for (name, tag), curve in event_points(run).items()
            if tag != "config" and not is_timing(tag)
        }
        for run in (workdir, reference)
    )
    assert points == expected
