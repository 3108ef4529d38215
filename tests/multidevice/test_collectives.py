"""No collective moves more bytes per chip when the mesh and the global batch grow together.

Collectives are read from compiled steps that never run. XLA gathers the whole batch for a plain
FFT; such a step is compiled as well, to check that the test detects it.
"""

import functools
import itertools
import json
from unittest import mock

import jax
import pytest

from spectral_pod.analysis import hlo
from spectral_pod.objectives import Classification
from spectral_pod.ops import fft
from spectral_pod.train.step import abstract_batch, jit_eval_step, jit_train_step
from tests.multidevice import fake_devices


def pair(small, large, **options):
    """Two programs whose meshes differ in the size of one axis, with equal rows a chip.

    Without tensor parallelism only parameters and gradients travel, so there the larger mesh has
    even twice the rows a chip.
    """
    rows_a_chip = (4, 4) if "tensor" in small else (4, 8)
    return [{"sizes": s, "rows_a_chip": n} | options for s, n in zip((small, large), rows_a_chip)]


USUAL = {"model.dtype": "bfloat16", "model.remat": "full", "train.grad_accumulation": 2}
UNUSUAL = (
    {"model.dtype": "float32", "model.remat": "none"},
    {"model.dtype": "float32", "model.remat": "full"},
    {"model.dtype": "bfloat16", "model.remat": "none"},
    {"model.spectral.parametrization": "time", "model.spectral.kernel_dropout": 0.1},
)
PAIRS = {
    "data": ("data=2 fsdp=2", "data=4 fsdp=2"),
    "fsdp": ("data=2 fsdp=2", "data=2 fsdp=4"),
    "data beside tensor": ("data=2 tensor=2", "data=4 tensor=2"),
    "fsdp beside tensor": ("fsdp=2 tensor=2", "fsdp=4 tensor=2"),
}
QUICK = {
    "data": pair(*PAIRS["data"], overrides=USUAL),
    "evaluation": pair(*PAIRS["data"], overrides=USUAL, evaluation=True),
}
# Only the FFT grows there: the rest of the model can be left out.
PLAIN = USUAL | {"model.memory_interval": 0, "model.dropout": 0.0}
CONTROL = {"plain FFT": pair(*PAIRS["data"], overrides=PLAIN, plain_fft=True)}
SLOW = {
    f"{axis}, {overrides}": pair(*PAIRS[axis], overrides=overrides)
    for axis, overrides in itertools.product(PAIRS, (USUAL, *UNUSUAL))
    if not (axis in QUICK and overrides is USUAL)
} | {
    f"evaluation, {axis}": pair(*PAIRS[axis], overrides={}, evaluation=True)
    for axis in PAIRS
}  # fmt: skip


# ---- in a process with fake devices


def compile_pairs(pairs):
    """For each pair of programs the kinds of the larger one's collectives, and those that grow."""
    return [compare(*pair) for pair in pairs]


def compare(small, large):
    small, large = collectives(json.dumps(small)), collectives(json.dumps(large))
    return {
        "kinds": sorted({c.kind for c in large}),
        "grown": [
            [mine.kind, mine.source, mine.count, mine.bytes, cover and cover.bytes]
            for mine, cover in hlo.grown(small, large)
        ],
    }


@functools.cache
def collectives(options):
    """Those of `compile_step`; several pairs share their smaller program."""
    return compile_step(**json.loads(options))


def compile_step(sizes, rows_a_chip, overrides, evaluation=False, plain_fft=False):
    layers = {"model.num_layers": 2, "model.memory_interval": 1}
    s = fake_devices.setup(sizes, **layers | overrides)
    rows = rows_a_chip * s.mesh.shape["data"] * s.mesh.shape["fsdp"]
    batch = abstract_batch(rows, s.config.data.seq_len, s.mesh)
    shard_op = (lambda fn, *_: fn) if plain_fft else fft.shard_op
    with jax.set_mesh(s.mesh), mock.patch.object(fft, "shard_op", shard_op):
        if evaluation:
            step = jit_eval_step(s.model, Classification, s.mesh, s.abstract)
            step = step.lower(s.abstract.params, batch)
        else:
            step = jit_train_step(
                s.model, s.optimizer, Classification, s.config, s.mesh, s.abstract
            )
            step = step.lower(s.abstract, batch)
        return hlo.collectives(step.compile().as_text())


# ---- under pytest


@functools.cache
def compared(names):
    """What a process says of these pairs, by name; they share their smaller programs."""
    pairs = QUICK | CONTROL | SLOW
    found = fake_devices.run(__file__, "compile_pairs", [pairs[name] for name in names])
    return dict(zip(names, found, strict=True))


def together(name):
    """The names of the pairs that one process compiles: those that run by default, or the slow
    ones with the same options."""
    if name not in SLOW:
        return (*QUICK, *CONTROL)
    return tuple(other for other in SLOW if options(SLOW[other]) == options(SLOW[name]))


def options(pair):
    return {key: value for key, value in pair[0].items() if key not in ("sizes", "rows_a_chip")}


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_no_collective_grows_with_the_mesh(name):
    found = compared(together(name))[name]
    assert "all-reduce" in found["kinds"]
    assert found["grown"] == []


def test_a_plain_fft_would_grow():
    found = compared(together("plain FFT"))["plain FFT"]["grown"]
    assert sum(one[2] for one in found) >= 4  # forward and backward, to frequencies and back
    for kind, source, _, size, size_before in found:
        assert kind == "all-gather"
        assert "fft" in source
        assert size == 4 * size_before  # twice the chips, twice the rows a chip


if __name__ == "__main__":
    fake_devices.main(compile_pairs)
