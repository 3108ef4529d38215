"""Probes say the same on every mesh."""

import functools

import jax
import numpy as np
import pytest

from spectral_pod.objectives import Classification, NextByte
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.train.probes import probe_step
from tests.models.drawn import drawn_state
from tests.multidevice import fake_devices
from tests.multidevice.test_same_numbers import make_batch

MODELS = {
    "classifier": {"model.pattern": ("spectral", "delta"), "model.num_layers": 2},
    "language model": {"model.name": "spectral_gpt", "model.num_layers": 2},
}
MESHES = ("data=2 fsdp=2 tensor=2", "sequence=2 tensor=2")


# ---- in a process with fake devices


def probes(sizes, model):
    overrides = MODELS[model] | {"model.dropout": 0.0, "train.grad_accumulation": 2}
    s = fake_devices.setup(sizes, **overrides)
    objective = NextByte if s.model.causal else Classification
    compute = functools.partial(
        probe_step, model=s.model, optimizer=s.optimizer, objective=objective, config=s.config
    )
    shardings = jax.tree.map(lambda x: x.sharding, s.abstract)
    batch = make_batch(0, by_position=objective.by_position)
    with on_mesh(s.mesh):
        state = drawn_state(s.abstract, s.model, s.mesh, step=3)
        run = jax.jit(compute, in_shardings=(shardings, batch_sharding(s.mesh)))
        found = run(state, jax.device_put(batch, batch_sharding(s.mesh)))
    return {name: np.asarray(x) for name, x in found.items()}


def differences(model):
    """By mesh, how far each probe is from that of one device, relative to its largest value."""
    expected = probes("", model)
    found = {}
    for sizes in MESHES:
        found[sizes] = {
            name: float(np.max(np.abs(x - expected[name])) / max(1e-6, np.max(np.abs(x))))
            for name, x in probes(sizes, model).items()
        }
    return found


# ---- tests


@pytest.mark.parametrize("model", [pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_probes_say_the_same_on_every_mesh(model):
    for sizes, found in fake_devices.run(__file__, "differences", model).items():
        assert "layer_0/grad_norm/dynamics" in found
        for name, difference in found.items():
            assert difference < 1e-3, (sizes, name)


if __name__ == "__main__":
    fake_devices.main(differences)
