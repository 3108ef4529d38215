"""No collective moves more bytes per chip when the mesh and the global batch grow together.

Read from compiled steps that never run: what the chips of a larger mesh would send each other.
XLA gathers the whole batch for a plain FFT; that step is compiled too, to see that it is caught.
"""

import functools
import itertools
import json
from unittest import mock

import jax
import pytest

from spectral_pod.analysis import hlo
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
    "fsdp": pair(*PAIRS["fsdp"], overrides=USUAL),
    "data beside tensor": pair(*PAIRS["data beside tensor"], overrides=USUAL),
    "evaluation": pair(*PAIRS["data"], overrides=USUAL, evaluation=True),
}
CONTROL = {"plain FFT": pair(*PAIRS["data"], overrides=USUAL, plain_fft=True)}
SLOW = {
    f"{axis}, {overrides}": pair(*PAIRS[axis], overrides=overrides)
    for axis, overrides in itertools.product(PAIRS, (USUAL, *UNUSUAL))
    if not (axis in QUICK and overrides is USUAL)
} | {
    f"evaluation, {axis}": pair(*PAIRS[axis], overrides={}, evaluation=True)
    for axis in PAIRS
}  # fmt: skip


# ---- in a process with fake devices


def compile_steps(programs):
    """The collectives of each program, as [kind, bytes, what, source]."""
    return [compile_step(**program) for program in programs]


def compile_step(sizes, rows_a_chip, overrides, evaluation=False, plain_fft=False):
    layers = {"model.num_layers": 2, "model.memory_interval": 1}
    s = fake_devices.setup(sizes, **layers, **overrides)
    rows = rows_a_chip * s.mesh.shape["data"] * s.mesh.shape["fsdp"]
    batch = abstract_batch(rows, s.config.data.seq_len, s.mesh)
    shard_op = (lambda fn, *_: fn) if plain_fft else fft.shard_op
    with jax.set_mesh(s.mesh), mock.patch.object(fft, "shard_op", shard_op):
        if evaluation:
            step = jit_eval_step(s.model, s.mesh, s.abstract).lower(s.abstract.params, batch)
        else:
            step = jit_train_step(s.model, s.tx, s.config, s.mesh, s.abstract)
            step = step.lower(s.abstract, batch)
        found = hlo.collectives(step.compile().as_text())
    return [(c.kind, c.bytes, c.what, c.source) for c in found]


# ---- under pytest


@functools.cache
def compiled(slow):
    """The collectives of every program of every pair, by name of the pair."""
    pairs = SLOW if slow else QUICK | CONTROL
    programs = {json.dumps(p): p for programs in pairs.values() for p in programs}
    found = dict(zip(programs, fake_devices.run(__file__, "compile_steps", [*programs.values()])))
    return {name: [found[json.dumps(p)] for p in programs] for name, programs in pairs.items()}


def grown(small, large):
    """The collectives of the larger mesh that one of the smaller mesh doesn't account for.

    By kind, every one is covered by one of its own in the smaller mesh, of at least its bytes.
    """
    found = []
    for kind in {c[0] for c in large}:
        ours, theirs = (
            sorted((c for c in cs if c[0] == kind), key=lambda c: -c[1]) for cs in (large, small)
        )
        for mine, cover in itertools.zip_longest(ours, theirs[: len(ours)]):
            if cover is None or mine[1] > cover[1]:
                found.append((mine, cover))
    return found


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_no_collective_grows_with_the_mesh(name):
    small, large = compiled(slow=name in SLOW)[name]
    assert {c[0] for c in large} >= {"all-reduce"}
    assert grown(small, large) == []


def test_a_plain_fft_would_grow():
    found = grown(*compiled(slow=False)["plain FFT"])
    assert len(found) >= 4  # forward and backward, to frequencies and back
    for mine, cover in found:
        assert mine[0] == "all-gather"
        assert "fft" in mine[3]
        assert mine[1] == 4 * cover[1]  # twice the chips, twice the rows a chip


if __name__ == "__main__":
    fake_devices.main(compile_steps)
