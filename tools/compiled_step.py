"""The real training and evaluation steps of a configuration, compiled for a topology.

Compiling for TPUs takes a minute or so, and without a TPU JAX's own cache cannot load the programs.
So the compiler's results are cached in `CACHE`: the program as text and its memory figures, or the
message that it ran out of memory; and the schedules of kernels.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from spectral_pod import config as config_lib
from spectral_pod import models
from spectral_pod.analysis import flops, hardware, kernel_schedule
from spectral_pod.analysis.hardware import Topology
from spectral_pod.analysis.kernel_calls import Signature
from spectral_pod.analysis.kernel_schedule import Schedule
from spectral_pod.config import Config
from spectral_pod.data import tasks
from spectral_pod.ops.choice import Choice
from spectral_pod.parallel.mesh import make_mesh, on_mesh
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import TrainState, abstract_state
from spectral_pod.train.step import abstract_batch, jit_eval_step, jit_train_step
from spectral_pod.validation import validate, validate_mesh

CACHE = "~/.cache/spectral_pod/preflight"
STEPS = ("train", "eval")
_PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}  # of devices, and to lower for
_OPTIONS = {"gpu": {"xla_gpu_autotune_level": 0}}  # to tune needs the device; {} elsewhere
_MEMORY = ("argument", "output", "alias", "temp", "generated_code")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's result for a step: the program and its bytes per chip, or why it failed."""

    text: str
    memory: dict[str, int]
    out_of_memory: str = ""  # the compiler's message; `text` is then empty

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of a chip's memory, with results in place of donated arguments."""
        return sum(self.memory.values()) - 2 * self.memory["alias"]


@dataclasses.dataclass(frozen=True)
class Setup:
    """A configuration on a topology, with its steps lowered but not compiled."""

    config: Config
    topology: Topology
    num_hosts: int
    mesh: Mesh
    abstract: TrainState
    analytic_flops: float  # of a training step on the whole mesh
    operations: dict[str, Choice]  # the method of each in training, and why
    traced: Any  # the training step
    lowered: dict[str, Any]  # by the names of `STEPS`


def set_up(config: Config, topology: Topology, names: Sequence[str] = STEPS) -> Setup:
    """Builds the steps as the trainer does, from the same parts, without data or device memory.

    Args:
      config: the configuration.
      topology: what to compile for.
      names: the steps to lower, 'train' among them.

    Raises:
      ConfigError: the configuration cannot run on this topology.
    """
    validate(config)
    devices = hardware.devices(topology)
    mesh = make_mesh(validate_mesh(config, len(devices)), devices)
    task = tasks.make(config.data.task, config.data.options)
    num_classes, vocab_size = task.num_classes, task.vocab_size
    row_len = config_lib.row_len(config)
    model = models.build(config, num_classes=num_classes, vocab_size=vocab_size)
    objective = task.objective
    optimizer = make_optimizer(config, model, mesh)
    abstract = abstract_state(model, optimizer.tx, mesh)
    batch, eval_batch = (
        abstract_batch(rows, row_len, mesh, by_position=objective.by_position)
        for rows in (config.train.global_batch_size, config.train.eval_batch_size)
    )
    steps: dict[str, tuple[Any, ...]] = {
        "train": (
            jit_train_step(model, optimizer, objective, config, mesh, abstract),
            abstract,
            batch,
        ),
        "eval": (jit_eval_step(model, objective, mesh, abstract), abstract.params, eval_batch),
    }
    with on_mesh(mesh):
        operations = models.operations(config)
        traced = {name: steps[name][0].trace(*steps[name][1:]) for name in names}
        lowered = {
            name: step.lower(lowering_platforms=(_PLATFORMS[devices[0].platform],))
            for name, step in traced.items()
        }
    return Setup(
        config=config,
        topology=topology,
        num_hosts=len({(getattr(d, "slice_index", 0), d.process_index) for d in devices}),
        mesh=mesh,
        abstract=abstract,
        analytic_flops=flops.train_flops(config, abstract.params, num_classes, vocab_size),
        operations=operations,
        traced=traced["train"],
        lowered=lowered,
    )


def neighbour(setup: Setup) -> tuple[Config, Topology] | None:
    """The same configuration on half the chips, or else on twice as many, with equal rows a chip.

    The axis that changes is `data`, or `fsdp` where `data` is 1. None where a batch is not split at
    all, or no slice of such a size exists.
    """
    sizes = dict(setup.mesh.shape)
    axis = "data" if sizes["data"] > 1 else "fsdp"
    half, double = setup.topology.half(), setup.topology.double()
    per_slice = sizes[axis] // (setup.topology.num_slices if axis == "data" else 1)
    if sizes[axis] == 1:
        return None
    if half and half.num_chips > 1 and per_slice % 2 == 0:  # one chip has no collectives at all
        return _resized(setup.config, sizes, axis, lambda n: n // 2), half
    if double and setup.topology.chip.platform != "cpu":
        return _resized(setup.config, sizes, axis, lambda n: n * 2), double
    return None


def _resized(
    config: Config, sizes: dict[str, int], axis: str, resize: Callable[[int], int]
) -> Config:
    other = config_lib.copy(config)
    for name, size in (sizes | {axis: resize(sizes[axis])}).items():
        setattr(other.mesh, name, size)
    for field in ("global_batch_size", "eval_batch_size"):
        setattr(other.train, field, resize(getattr(config.train, field)))
    return other


def bytes_per_chip(tree: Any) -> int:
    """The sum over all leaves of the bytes of their largest shard."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def compile_all(setups: list[Setup], say: Callable[[str], None]) -> list[dict[str, Compiled]]:
    """Compiles every step of every setup, in parallel, and reports each to `say`."""
    jobs = [(s, name) for s in setups for name in s.lowered]
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        done = list(pool.map(lambda job: _compile(job[0], job[1], say), jobs))
    found: list[dict[str, Compiled]] = [{} for _ in setups]
    for (setup, name), compiled in zip(jobs, done, strict=True):
        found[setups.index(setup)][name] = compiled
    return found


def _compile(setup: Setup, name: str, say: Callable[[str], None]) -> Compiled:
    path, label = _path(_key(setup, name)), f"{name} step for {setup.topology}"
    if (stored := _load(path)) is not None:
        say(f"{label}: compiled before")
        return Compiled(**stored)
    started = time.monotonic()
    try:
        executable = setup.lowered[name].compile(_OPTIONS.get(setup.topology.chip.platform))
        figures = executable.memory_analysis()
        memory = {what: getattr(figures, f"{what}_size_in_bytes") for what in _MEMORY}
        compiled = Compiled(executable.as_text(), memory)
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|Oom|out of memory", str(error), re.IGNORECASE):
            raise
        compiled = Compiled("", dict.fromkeys(_MEMORY, 0), str(error))
    say(f"{label}: compiled in {time.monotonic() - started:.0f} s")
    _store(path, dataclasses.asdict(compiled))
    return compiled


def schedules(setup: Setup, say: Callable[[str], None]) -> dict[Signature, Schedule]:
    """The compiled schedules of the training step's kernels, each compiled alone.

    One whose schedule cannot be read is left out, and reported.
    """
    kernels = {one.signature: one for one in kernel_schedule.kernels(setup.traced.jaxpr.jaxpr)}
    found: dict[Signature, Schedule] = {}
    with contextlib.ExitStack() as stack:
        compiler = None
        for signature, kernel in kernels.items():
            path, label = _path(_digest(setup, str(kernel))), f"kernel {signature[0]}"
            if (stored := _load(path)) is not None:
                say(f"{label}: compiled before")
                found[signature] = Schedule(**stored)
                continue
            compiler = compiler or stack.enter_context(kernel_schedule.Compiler(setup.topology))
            started = time.monotonic()
            try:
                found[signature] = compiler.schedule(kernel)
            except ValueError as error:
                say(f"{label}: {error}")
                continue
            say(f"{label}: compiled in {time.monotonic() - started:.0f} s")
            _store(path, dataclasses.asdict(found[signature]))
    return found


def _path(key: str) -> str:
    return os.path.join(os.path.expanduser(CACHE), f"{key}.json.gz")


def _load(path: str) -> Any:
    if not os.path.exists(path):
        return None
    with gzip.open(path, "rt") as file:
        return json.load(file)


def _store(path: str, data: dict[str, Any]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with gzip.open(f"{path}.{os.getpid()}", "wt", compresslevel=5) as file:
        json.dump(data, file)
    os.replace(f"{path}.{os.getpid()}", path)


def _key(setup: Setup, name: str) -> str:
    """A digest of all that a compiled step depends on, which line numbers do not change."""
    text = setup.lowered[name].as_text(debug_info=True)
    return _digest(setup, re.sub(r'\.py":\d+:\d+( to (\d+)?:\d+)?', '.py"', text))


def _digest(setup: Setup, text: str) -> str:
    """A digest of a program and of all that its compiler depends on."""
    compiler = {"cpu": "jaxlib", "gpu": "jaxlib", "tpu": "libtpu"}[setup.topology.chip.platform]
    versions = f"{compiler} {importlib.metadata.version(compiler)} {jax.__version__}"
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "PJRT_NPROC")]
    layout = [field.name for one in (Compiled, Schedule) for field in dataclasses.fields(one)]
    key = json.dumps([text, str(setup.topology), versions, flags, layout])
    return hashlib.sha256(key.encode()).hexdigest()[:24]
