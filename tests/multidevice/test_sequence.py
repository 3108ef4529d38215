"""Filters give the same numbers where positions are split, and only exchange positions."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from spectral_pod.analysis import hlo
from spectral_pod.ops.fft import spectral_filter
from spectral_pod.ops.long_conv import causal_conv
from spectral_pod.parallel.sharding import spec
from spectral_pod.shapes import PAD
from tests.multidevice import fake_devices
from tests.multidevice.test_same_numbers import any_state, make_step

# Mesh, positions, channels: channels for every device, or too few of them (four steps).
CASES = {
    "exchange, 2": ("sequence=2", 37 * 2, 6),
    "exchange, 4 beside all else": ("data=2 sequence=2 tensor=2", 256, 8),
    "exchange, 8 of 16,384": ("sequence=8", 16_384, 8),
    "four steps, 2": ("sequence=2", 36, 3),
    "four steps, 4 beside data": ("data=2 sequence=4", 16 * 15, 2),
    "four steps beside tensor": ("sequence=4 tensor=2", 256, 6),
    "four steps, 8 of 16,384": ("sequence=8", 16_384, 2),
}
BATCH = 6


# ---- in a process with fake devices


def compare():
    """For each case and operation: relative errors of the result and of both gradients, and the
    kinds of collectives with the bytes of the largest."""
    return {
        f"{name}: {op}": compare_op(op, *case)
        for name, case in CASES.items()
        for op in ("spectral_filter", "causal_conv")
    }


def long_step():
    """The loss and the optimizer's first moments by name, after a step on 16,384 bytes a row."""
    rng, length = np.random.default_rng(0), 16_384
    tokens = rng.integers(0, 256, (2, length)).astype(np.int32)
    tokens[1, 9_999:] = PAD
    batch = {"tokens": tokens, "labels": np.asarray([1, 2], np.int32), "valid": np.ones(2, bool)}
    overrides = {"data.seq_len": length, "model.num_layers": 1, "model.dropout": 0.0}
    overrides["model.memory_interval"] = 1
    found = {}
    for sizes in ("", "sequence=8"):
        state, step = make_step(sizes, any_state, **overrides)
        state, loss = step(state, batch)
        moments = fake_devices.leaves(state.opt_state[1].mu)
        found[sizes] = {"loss": loss} | {name: x.tolist() for name, x in moments.items()}
    return found


def compare_op(op, sizes, length, width):
    rng = np.random.default_rng(0)
    position = 1 if op == "spectral_filter" else 2
    shape = (BATCH, length, width) if position == 1 else (BATCH, width, length)
    x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
    if op == "spectral_filter":
        w = rng.normal(size=(2, length + 1, width)).astype(np.float32)
        axes = ("batch", "position", "channel")
    else:
        w = rng.normal(size=(width, length // 2 + 1)).astype(np.float32)
        axes = ("batch", "channel", "position")

    def run(x, w, dy):
        def apply(x, w):
            if op == "causal_conv":
                return causal_conv(x, w)
            return spectral_filter(x, jax.lax.complex(w[0], w[1]), 2 * length)

        y, pullback = jax.vjp(apply, x, w)
        return y, *pullback(dy)

    want = jax.device_get(jax.jit(run)(x, w, dy))
    mesh = fake_devices.mesh_of(sizes)
    split = NamedSharding(mesh, spec(*axes))
    whole = NamedSharding(mesh, spec())
    with jax.set_mesh(mesh):
        args = jax.device_put(x, split), jax.device_put(w, whole), jax.device_put(dy, split)
        step = jax.jit(run, out_shardings=(split, split, whole)).lower(*args).compile()
        got = jax.device_get(step(*args))
    collectives = hlo.collectives(step.as_text())
    return {
        "errors": [float(np.abs(g - t).max() / np.abs(t).max()) for g, t in zip(got, want)],
        "collectives": [(c.kind, c.bytes) for c in collectives],
        "bytes a device": x.nbytes // mesh.size,
        "bytes of a spectrum": 2 * length * width * 8,
    }


# ---- under pytest


@functools.cache
def compared():
    return fake_devices.run(__file__, "compare")


@pytest.mark.parametrize("op", ["spectral_filter", "causal_conv"])
@pytest.mark.parametrize("case", CASES)
def test_equals_whole_sequences(case, op):
    assert max(compared()[f"{case}: {op}"]["errors"]) <= 1e-5


@pytest.mark.parametrize("op", ["spectral_filter", "causal_conv"])
@pytest.mark.parametrize("case", CASES)
def test_a_device_never_holds_another_ones_activations(case, op):
    """Exchanges move what a device has, or pairs of it as complex numbers; the rest is filters."""
    found = compared()[f"{case}: {op}"]
    exchanges = [size for kind, size in found["collectives"] if kind == "all-to-all"]
    assert exchanges
    assert max(exchanges) <= 3 * found["bytes a device"]
    others = [size for kind, size in found["collectives"] if kind != "all-to-all"]
    assert max(others, default=0) <= found["bytes of a spectrum"]


@pytest.mark.slow
def test_a_whole_step_on_16384_bytes_equals_that_of_one_device():
    found = fake_devices.run(__file__, "long_step")
    assert found[""].keys() == found["sequence=8"].keys()
    for name, want in found[""].items():
        difference = np.subtract(found["sequence=8"][name], want)
        assert np.linalg.norm(difference) <= 1e-5 * np.linalg.norm(want), name


if __name__ == "__main__":
    fake_devices.main(compare, long_step)
