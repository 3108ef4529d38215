"""A run's start: what its processes must agree on, its claim of the workdir, and its record."""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

import spectral_pod
from spectral_pod import config as config_lib
from spectral_pod import lease, models, project_files, storage
from spectral_pod.config import Config
from spectral_pod.data import tasks
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.errors import CheckpointError, ConfigError, DataError
from spectral_pod.layers.block import mixers_of
from spectral_pod.parallel import runtime

# Where a restart may differ: none changes the numbers of a run beyond float rounding.
_FREE_TO_CHANGE = (
    "mesh.", "checkpoint.", "data.dir", "data.stores", "data.threads", "data.prefetch",
    "data.copies_", "train.eval_", "train.log_every_steps", "train.compilation_cache",
    "train.stall_", "train.profile_steps", "train.probe_every_steps", "train.wandb_project",
    "model.memory.method", "model.attention.method",
)  # fmt: skip
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
_LOCAL = ("data.dir", "data.copies_dir")  # folders of a host, whose names may differ between hosts


def facts(config: Config) -> dict[str, str]:
    """Everything that determines a process's program and data; equal in all processes of a run."""
    fields = config_lib.flat(config_lib.to_dict(config))
    values = {f"config.{name}": repr(x) for name, x in fields.items() if name not in _LOCAL}
    values |= {f"package {name}": _version(name) for name in _PACKAGES}
    return values | {"code of spectral_pod": _code_version(), "Python": platform.python_version()}


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[Callable[[], None]]:
    """Holds the workdir for this run; yields a function that raises once another run has taken it.

    Raises:
      InUseError: another run is training in it.
    """
    if not runtime.is_leader():
        yield lambda: None
        return
    with lease.of_workdir(workdir, runtime.print_once) as held:
        yield held.check


def claim_workdir(
    workdir: str,
    config: Config,
    data_digest: str,
    classes: Sequence[str] = (),
    *,
    former_digests: Sequence[str] = (),
    read_only: bool = False,
) -> str:
    """Records the configuration and the data of a run in its workdir, or checks what is there.

    Args:
      data_digest: of the data, to be recorded.
      classes: the names of what a classifier predicts.
      former_digests: those that older versions recorded for the same data.
      read_only: whether it is an error if nothing is recorded yet.

    Returns:
      The identity of the run.

    Raises:
      ConfigError: the workdir belongs to another configuration, or its data have changed.
      DataError: the record is damaged, or with `read_only` missing.
    """
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        if read_only:
            raise DataError(f"{workdir} is no workdir of a run: it has no config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        mine = config_lib.to_dict(config)
        facts = {"config": mine, "data_digest": data_digest, "classes": list(classes)}
        task = tasks.make(config.data.task, config.data.options)
        if isinstance(task, LanguageModelling) and task.tokenizer:
            facts["tokenizer_sha256"] = task.vocabulary.sha256
        project_files.RUN.write(file, facts)
    recorded = project_files.RUN.read(file)
    if changed := differences(recorded, config, str(file)):
        raise ConfigError(
            f"workdir {workdir} belongs to a run of another configuration ("
            + "; ".join(changed)
            + "); continue it with its own values, or give another --workdir"
        )
    if recorded["data_digest"] not in (data_digest, *former_digests):
        raise ConfigError(
            f"workdir {workdir} was trained on another version of the data: its store had digest "
            f"{recorded['data_digest'][:12]}, this one has {data_digest[:12]}; point "
            "config.data.dir at the old store, or give another --workdir"
        )
    if recorded.get("classes", list(classes)) != list(classes):
        raise ConfigError(
            f"workdir {workdir} was trained to predict {recorded['classes'][:8]}, and the data "
            f"have {list(classes)[:8]}; point config.data.dir at the old store, or give another "
            "--workdir"
        )
    return project_files.run_id(recorded)


@contextlib.contextmanager
def released_on_error(workdir: str) -> Iterator[None]:
    """Where a run that never started fails in this context by what its configuration names, takes
    back what `claim_workdir` recorded, so that the corrected command can use the workdir."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError):  # and not: another run has taken it over
        folder = epath.Path(workdir)
        if runtime.is_leader() and not (folder / "starts.jsonl").exists():
            (folder / "config.json").unlink()
        raise


def has_ended(workdir: str, step: int) -> bool:
    """Whether the run in a workdir had come to its end when it was saved after this step.

    A damaged result says nothing about that; this run writes it again.
    """
    file = epath.Path(workdir) / "result.json"
    try:
        return file.exists() and project_files.RESULT.read(file)["step"] == step
    except DataError:
        return False


def differences(recorded: project_files.Run, config: Config, file: str) -> list[str]:
    """What in a configuration makes it another run's than the one that is recorded in `file`."""
    fields: Any = copy.deepcopy(recorded["config"])
    config_lib.fill(fields, json.loads(json.dumps(config_lib.defaults_of(fields, file))))
    mine = json.loads(json.dumps(config_lib.to_dict(config)))
    theirs, ours = _resolved(fields), _resolved(mine)
    free = (*_FREE_TO_CHANGE, *_unread_sections(config))
    return [
        f"config.{key}: {theirs.get(key, 'absent')!r} there, {ours.get(key, 'absent')!r} now"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not key.startswith(free)
    ]


def _unread_sections(config: Config) -> list[str]:
    """Prefixes of the fields of what the model does not have: they change nothing."""
    mixers = mixers_of(models.architecture(config)).values()
    read: set[str] = set().union(*(mixer.sections() for mixer in mixers))
    if models.MODELS[config.model.name].reads_patches:
        read.add("patch")
    return [f"model.{section}." for section in config_lib.model_sections().keys() - read]


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, with all options of its task that identify the data."""
    data = config["data"]
    options = data["options"]
    with contextlib.suppress(ConfigError):  # of another version: compared as they are
        options = tasks.make(data["task"], options).identity()
    data = data | {"options": json.loads(json.dumps(options))}
    return config_lib.flat(config | {"data": data})


def record_start(
    workdir: str,
    mesh: Mesh,
    step: int,
    operations: Mapping[str, tuple[str, str]],
    origin: project_files.Origin | None = None,
) -> list[str]:
    """Appends to `starts.jsonl`; returns messages on what has changed since the last start.

    Args:
      operations: the method of each operation, and why it was chosen.
      origin: where the parameters are from, if they were read from another run now.
    """
    if not runtime.is_leader():
        return []
    file = epath.Path(workdir) / "starts.jsonl"
    log = project_files.Log(file, project_files.START)
    changes = []
    if log.damaged:
        changes = [f"{log.damaged} line(s) of {file} are damaged; see {log.keep_damaged()}"]
    start: project_files.Start = {
        "wall_time": round(time.time(), 3),
        "step": step,
        "processes": jax.process_count(),
        "devices": f"{mesh.size} {mesh.devices.flat[0].device_kind}",
        "mesh": dict(mesh.shape),
        "code": _code_version(),
        "jax": _version("jax"),
        "operations": {name: method for name, (method, _) in operations.items()},
        "reasons": {name: reason for name, (_, reason) in operations.items()},
    }
    if origin is not None:
        start["start_from"] = origin
    lines = [json.dumps(line) + "\n" for line in (*log.lines, start)]
    storage.write_whole(file, "".join(lines))
    if not log.lines:
        return changes
    last: Any = log.lines[-1]
    return changes + [
        f"{name} changed since the last start: {last[name]} before, {start[name]} now"
        for name in ("processes", "devices", "mesh", "code", "jax", "operations")
        if last.get(name, start[name]) != start[name]
    ]


def _code_version() -> str:
    """The sha256 of the package's source files and their names, shortened."""
    root = pathlib.Path(spectral_pod.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
