"""Runs a test file as a script on eight fake CPU devices, in a process of its own.

Such a file has two roles: pytest collects its tests, and the process that `run` starts calls `main`
with the functions that the tests may request. One process serves many meshes, each of as many of
the first devices as it needs.
"""

import json
import math
import sys
import types

import jax
import numpy as np

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.parallel.mesh import AXES, make_mesh
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state
from tests import conftest, processes, trainer

NUM_CLASSES = 10


def run(file, function, *arguments):
    """What `function(*arguments)` of a test file returns in a process of its own, as JSON."""
    command = [sys.executable, file, function, json.dumps(arguments)]
    environment = trainer.environment() | {"XLA_FLAGS": processes.xla_flags(8)}
    done = processes.run(
        command, cwd=trainer.ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-5000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def main(*functions):
    """Answers `run`, in its process."""
    assert conftest  # JAX is as strict here as in every test
    _, name, arguments = sys.argv
    print(json.dumps({f.__name__: f for f in functions}[name](*json.loads(arguments))))


def mesh_of(sizes):
    """The mesh of a text like 'data=2 fsdp=2', of the first devices; '' is a single one."""
    given = {axis: int(size) for axis, size in (item.split("=") for item in sizes.split())}
    devices = jax.devices()[: math.prod(given.values())]
    return make_mesh({axis: given.get(axis, 1) for axis in AXES}, devices)


def setup(sizes, **overrides):
    """A small model, its optimizer and its abstract state on a mesh."""
    config = default()
    small = {
        "data.seq_len": 256,
        "model.dtype": "float32",
        "model.num_layers": 4,
        "model.hidden_dim": 32,
        "model.embed_dim": 16,
        "model.dropout": 0.1,
        "model.memory.num_heads": 2,
        "model.memory.head_dim": 8,
        "train.total_steps": 20,
        "optimizer.warmup_steps": 5,
    }
    config.update_from_flattened_dict(small | overrides)
    mesh = mesh_of(sizes)
    model = models.build(config, seq_len=config.data.seq_len, num_classes=NUM_CLASSES)
    optimizer = make_optimizer(config, model, mesh)
    abstract = abstract_state(model, optimizer.tx, mesh)
    return types.SimpleNamespace(
        config=config, mesh=mesh, model=model, optimizer=optimizer, abstract=abstract
    )


def name(path):
    """A leaf's name from its path in a tree, like 'params/encoder/embedding'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves(tree):
    """The arrays of a tree by name, as numpy arrays."""
    return {name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
