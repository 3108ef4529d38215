"""Mixers give the same outputs and gradients on meshes that split rows, heads or positions."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from spectral_pod.analysis import hlo
from spectral_pod.config import default
from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.ops import blocked_attention
from spectral_pod.parallel.sharding import spec, tree_shardings
from tests.multidevice import fake_devices

pytestmark = pytest.mark.slow  # twelve mixers on five meshes

ROWS, LENGTH, WIDTH = 4, 138, 8
MIXED = {
    "attention": (True, False),
    "local_attention": (True, False),
    "linear_attention": (True, False),
    "linformer": (False,),
    "fnet": (False,),
    "s5": (True, False),
    "selective": (True, False),
}
CASES = {f"{name}, {causal=}": (name, causal) for name, both in MIXED.items() for causal in both}
SMALL = {
    "dtype": "float32",
    "attention.num_heads": 2,
    "attention.window": 10,
    "attention.rank": 6,
    "s5.state_dim": 6,
    "s5.blocks": 3,
    "selective.rank": 3,
}
QUICK = ("data=2 tensor=2", "sequence=2")
SLOW = ("data=2 sequence=2 tensor=2", "fsdp=2 tensor=2")
TOLERANCE = 1e-5


# ---- in a process with fake devices


def module_of(name, causal, **overrides):
    model = default().model
    model.update_from_flattened_dict(SMALL | overrides)
    config = Architecture.of(model.to_dict(), hidden_dim=WIDTH, max_positions=LENGTH, causal=causal)
    return MIXERS[name].from_config(config, deterministic=True, name="mixer")


def problem():
    """x, the cotangent of a mixer's output, and a mask with padding on either side."""
    x, dy = np.random.default_rng(0).normal(size=(2, ROWS, LENGTH, WIDTH)).astype(np.float32)
    n = np.arange(LENGTH)
    return x, dy, (n >= [[0], [0], [5], [90]]) & (n < [[138], [60], [138], [138]])


def results(name, causal, sizes):
    """The output at valid positions and all gradients on a mesh, by name, and what its program
    communicates as (kind, bytes)."""
    module, (x, dy, mask) = module_of(name, causal), problem()

    def init():
        return module.init(jax.random.key(0), x, mask).get("params", {})

    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: np.float32(rng.normal(size=p.shape) * p.shape[0] ** -0.5),
        nn.unbox(jax.eval_shape(init)),
    )

    def run(params, x, dy, mask):
        y, pullback = jax.vjp(lambda p, x: module.apply({"params": p}, x, mask), params, x)
        dparams, dx = pullback(dy)
        return {"y": jnp.where(mask[..., None], y, 0.0), "params": dparams, "dx": dx}

    mesh = fake_devices.mesh_of(sizes)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, spec("batch", "position", None))
        rows_mask = NamedSharding(mesh, spec("batch", "position"))
        params_place = tree_shardings(jax.eval_shape(init), mesh)
        args = params, x, np.where(mask[..., None], dy, 0), mask
        args = jax.device_put(args, (params_place, rows, rows, rows_mask))
        places = {"y": rows, "params": params_place, "dx": rows}
        program = jax.jit(run, out_shardings=places).lower(*args).compile()
        found = fake_devices.leaves(program(*args))
    return found, [(c.kind, c.bytes) for c in hlo.collectives(program.as_text())]


def compare(meshes):
    """By mesh and case: relative errors by result, and collectives."""
    blocked_attention.BLOCK = 32  # positions, so that attention has several blocks
    on_one, found = {}, {}
    for case, which in CASES.items():
        on_one[case], _ = results(*which, "")
    for sizes in meshes:
        found[sizes] = {}
        for case, which in CASES.items():
            got, collectives = results(*which, sizes)
            errors = {name: distance(got[name], want) for name, want in on_one[case].items()}
            found[sizes][case] = {"errors": errors, "collectives": collectives}
    return found


def distance(actual, expected):
    assert np.abs(expected).max() > 0
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# ---- under pytest


@functools.cache
def compared(meshes):
    return fake_devices.run(__file__, "compare", meshes)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "sizes", [*QUICK, *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in SLOW)]
)
def test_equals_one_device(sizes, case):
    found = compared(QUICK if sizes in QUICK else SLOW)[sizes][case]
    assert max(found["errors"].values()) <= TOLERANCE, found["errors"]


@pytest.mark.parametrize("case", [case for case in CASES if "attention" in case or "s5" in case])
def test_rows_and_heads_never_travel(case):
    """Only sums are communicated: of the heads' results, and of gradients over rows."""
    collectives = compared(QUICK)["data=2 tensor=2"][case]["collectives"]
    assert {kind for kind, _ in collectives} == {"all-reduce"}


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("local", "linear"))])
def test_positions_travel_as_windows_and_states_only(case):
    collectives = compared(QUICK)["sequence=2"][case]["collectives"]
    assert max(size for _, size in collectives) < ROWS * LENGTH * WIDTH * 4 / 8


if __name__ == "__main__":
    fake_devices.main(compare)
