"""The state is sharded from its initialisation on: no chip ever holds a whole large array."""

import functools
import math
import re
from unittest import mock

import jax
import pytest

from spectral_pod.analysis import hlo
from spectral_pod.train.state import init_state
from tests.multidevice import fake_devices

SEQ_LEN = 2048
MESHES = {"fsdp=8": (8, 1), "data=2 fsdp=2 tensor=2": (2, 2)}  # and their fsdp and tensor


# ---- in a process with fake devices


def measure(meshes):
    """By mesh: bytes of every leaf of the state, and what its initialization holds and moves."""
    return [measure_one(sizes) for sizes in meshes]


def measure_one(sizes):
    widths = {"model.hidden_dim": 256, "model.embed_dim": 256, "data.seq_len": SEQ_LEN}
    s = fake_devices.setup(sizes, **widths)
    leaves = {
        fake_devices.name(path): {
            "bytes": x.size * x.dtype.itemsize,
            "shard": math.prod(x.sharding.shard_shape(x.shape)),
            "bytes per chip": math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize,
        }
        for path, x in jax.tree_util.tree_leaves_with_path(s.abstract)
    }
    jit = jax.jit
    with mock.patch.object(jax, "jit", lambda *args, **options: jit(*args, **options).lower):
        init = init_state(s.model, s.optimizer.tx, s.mesh, 0).compile()
    arrays = re.findall(r"\b(?:pred|[suf]\d+|bf16|c64)\[([\d,]+)\]", init.as_text())
    return {
        "leaves": leaves,
        "bytes per chip": init.memory_analysis().output_size_in_bytes,
        "largest array": max(math.prod(map(int, shape.split(","))) for shape in arrays),
        "collectives": [[c.kind, c.bytes, c.source] for c in hlo.collectives(init.as_text())],
    }


# ---- under pytest


@functools.cache
def measured():
    return dict(zip(MESHES, fake_devices.run(__file__, "measure", list(MESHES))))


@pytest.mark.parametrize("sizes", MESHES)
def test_bytes_per_chip_fall_with_what_splits(sizes):
    fsdp, tensor = MESHES[sizes]
    found = measured()[sizes]
    leaves = found["leaves"]
    whole = sum(leaf["bytes"] for leaf in leaves.values())
    split = sum(leaf["bytes per chip"] for leaf in leaves.values())
    assert split == pytest.approx(found["bytes per chip"], rel=1e-3)  # what a chip really gets
    assert whole / (fsdp * tensor) <= split <= 1.04 * whole / fsdp
    for name, leaf in leaves.items():
        assert leaf["bytes"] / leaf["bytes per chip"] in (1, tensor, fsdp, fsdp * tensor), name
        if leaf["bytes"] > 1 << 14:  # vectors may be whole, matrices not
            assert leaf["bytes"] / leaf["bytes per chip"] >= fsdp, name


@pytest.mark.parametrize("sizes", MESHES)
def test_moments_are_split_as_their_parameters(sizes):
    leaves = measured()[sizes]["leaves"]
    params = {n.removeprefix("params/"): leaf for n, leaf in leaves.items() if "params/" in n}
    assert len(params) > 30
    for moment in ("mu", "nu"):
        prefix = f"opt_state/1/{moment}/"
        split = {n.removeprefix(prefix): leaf for n, leaf in leaves.items() if prefix in n}
        assert split == params


@pytest.mark.parametrize("sizes", MESHES)
def test_initialization_holds_shards_only(sizes):
    found = measured()[sizes]
    assert found["largest array"] <= max(leaf["shard"] for leaf in found["leaves"].values())
    assert sum(size for _, size, _ in found["collectives"]) <= 1 << 14


if __name__ == "__main__":
    fake_devices.main(measure)
