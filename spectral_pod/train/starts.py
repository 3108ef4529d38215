"""What must agree between the processes of a run, and a record of the run's starts."""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import time

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

import spectral_pod
from spectral_pod import config as config_lib
from spectral_pod import storage
from spectral_pod.parallel import runtime

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
_LOCAL = ("data.dir", "data.copies_dir")  # folders of a host, whose names may differ between hosts


def facts(config: ConfigDict) -> dict[str, str]:
    """Everything that determines a process's program and data; equal in all processes of a run."""
    fields = config_lib.flat(config.to_dict())
    values = {f"config.{name}": repr(x) for name, x in fields.items() if name not in _LOCAL}
    values |= {f"package {name}": _version(name) for name in _PACKAGES}
    return values | {"code of spectral_pod": _code_version(), "Python": platform.python_version()}


def record_start(workdir: str, mesh: Mesh, step: int) -> list[str]:
    """Appends to `starts.jsonl`; returns messages on what has changed since the last start."""
    if not runtime.is_leader():
        return []
    file = epath.Path(workdir) / "starts.jsonl"
    before = file.read_text() if file.exists() else ""
    start = {
        "wall_time": round(time.time(), 3),
        "step": step,
        "processes": jax.process_count(),
        "devices": f"{mesh.size} {mesh.devices.flat[0].device_kind}",
        "mesh": dict(mesh.shape),
        "code": _code_version(),
        "jax": _version("jax"),
    }
    storage.write_whole(file, before + json.dumps(start) + "\n")
    if not before:
        return []
    last = json.loads(before.splitlines()[-1])
    return [
        f"{name} changed since the last start: {last[name]} before, {start[name]} now"
        for name in ("processes", "devices", "mesh", "code", "jax")
        if last.get(name) != start[name]
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
