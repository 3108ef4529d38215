"""Splitting positions changes no result of the delta rule, and only states are communicated."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops import delta_sequence
from spectral_pod.ops.delta_rule import delta_rule
from spectral_pod.parallel.sharding import spec
from tests.multidevice import fake_devices

B, N, H, K, V = 2, 600, 2, 8, 6  # blocks of 300, 150 and 75 positions
CLIPS = ("never", "once", "everywhere", "overflow")
# Meshes, whether there are gates, and the method of each device.
QUICK = (
    ("sequence=2", True, "chunked"),
    ("sequence=8", True, "chunked"),
    ("data=2 sequence=2 tensor=2", False, "chunked"),
    ("data=2 sequence=2 tensor=2", True, "batched"),
)
SLOW = (
    ("sequence=4", True, "chunked"),
    ("sequence=4", False, "chunked"),
    ("sequence=8", False, "chunked"),
    ("data=2 sequence=2", True, "chunked"),
    ("sequence=4 tensor=2", True, "chunked"),
    ("sequence=2", True, "batched"),
    ("sequence=4", False, "batched"),
    ("sequence=8", True, "batched"),
)
PROGRAMS = (("sequence=2", N), ("sequence=2", 4 * N), ("sequence=8", 4 * N))  # mesh, positions
METHODS = ("chunked", pytest.param("batched", marks=pytest.mark.slow))
TOLERANCE = 1e-5  # relative to the largest entry; measured: at most 2e-6
AXES = {"q": ("batch", "position", "head", None), "state": ("batch", "head", None, None)}
AXES |= {"k": AXES["q"], "v": AXES["q"], "beta": AXES["q"][:3], "log_gate": AXES["q"][:3]}
AXES |= {"mask": AXES["q"][:2], "o": AXES["q"]}


# ---- in a process with fake devices


def problem(clips="never", gated=True, length=N):
    """Inputs in float32 whose clip of 10 fires as often as `clips` says.

    The memory is long: what a block passes on of its incoming state is not lost in rounding.
    'overflow': long keys, with which the states without clips are NaN from the first block on.
    """
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, B, length, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = 0.3 * rng.normal(size=(B, length, H, V))
    if clips == "everywhere":
        v *= 200
    elif clips == "once":
        v[1, length // 2, 0] *= 200
    elif clips == "overflow":
        k[:, :16] *= 3e5
    inputs = {"q": q, "k": k, "v": v, "beta": rng.uniform(0, 0.1, (B, length, H))}
    inputs["state"] = 0.1 * rng.normal(size=(B, H, V, K))
    if gated:
        inputs["log_gate"] = -0.01 * rng.uniform(size=(B, length, H))
    return {name: x.astype(np.float32) for name, x in inputs.items()}


def results(inputs, method):
    """The reads, the final state and the gradients of a function of both, by name."""
    mask = jnp.asarray(np.random.default_rng(1).random((B, inputs["q"].shape[1])) < 0.9)
    rng = np.random.default_rng(2)
    weights = [jnp.float32(rng.normal(size=inputs[name].shape)) for name in ("v", "state")]

    def loss(inputs):
        tokens = [inputs[name] for name in ("q", "k", "v", "beta")]
        found = delta_rule(
            *tokens,
            log_gate_BNH=inputs.get("log_gate"),
            state_BHVK=inputs["state"],
            mask_BN=mask,
            method=method,
            clip=10.0,
        )[:2]
        return sum(jnp.sum(w * jnp.sin(x)) for w, x in zip(weights, found, strict=True)), found

    gradients, (o, state) = jax.grad(loss, has_aux=True)(inputs)
    return {"o": o, "last": state} | {f"d{name}": x for name, x in gradients.items()}


@functools.cache
def compiled(sizes, gated, length, method):
    """`results` as a program for a mesh, and the shardings of its inputs."""
    inputs = problem(gated=gated, length=length)
    mesh = fake_devices.mesh_of(sizes)
    with jax.set_mesh(mesh):
        places = {name: jax.NamedSharding(mesh, spec(*AXES[name])) for name in inputs}
        run = jax.jit(functools.partial(results, method=method), in_shardings=(places,))
        return run.lower(inputs).compile(), places


def compare(sizes, gated, method):
    """By kind of clips and result, the largest difference from one device, relative to the largest
    entry; NaN where an entry is."""
    program, places = compiled(sizes, gated, N, method)
    found = {}
    for clips in CLIPS:
        actual = jax.device_get(program(jax.device_put(problem(clips, gated), places)))
        expected = on_one_device(clips, gated)
        found[clips] = {name: distance(x, expected[name]) for name, x in actual.items()}
    return found


@functools.cache
def on_one_device(clips, gated):
    """No gates are gates of one: a single program gives both."""
    inputs = problem(clips, gated)
    ones = {"log_gate": np.zeros(inputs["beta"].shape, np.float32)}
    return jax.device_get(compiled("", True, N, "chunked")[0](ones | inputs))


def distance(actual, expected):
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() > 0
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def compare_all(cases):
    return [compare(*case) for case in cases]


def compare_quick():
    """The distances of the quick cases, and `programs`, which share a program."""
    return compare_all(QUICK), programs(PROGRAMS, "chunked")


def without_handing_over(method):
    """Whether results are finite where handing states over gives NaN, by kind of clips."""

    def hand_over(run, first, **_):
        return run(delta_sequence._varying(first * jnp.nan))

    with mock.patch.object(delta_sequence, "_pass_along", hand_over):
        program, places = compiled("sequence=2", True, N, method)
    found = {}
    for clips in CLIPS:
        actual = jax.device_get(program(jax.device_put(problem(clips), places)))
        found[clips] = all(np.isfinite(x).all() for x in actual.values())
    return found


def programs(cases, method):
    """Of each (mesh, positions): the collectives as [kind, type], and bytes of temporaries."""
    found = []
    for sizes, length in cases:
        program, _ = compiled(sizes, True, length, method)
        pattern = r"= (\(.*?\)|\S+) ([a-z-]+)\(.*channel_id="
        collectives = re.findall(pattern, program.as_text())
        found.append((sorted(collectives), program.memory_analysis().temp_size_in_bytes))
    return found


# ---- under pytest


@functools.cache
def quick():
    return fake_devices.run(__file__, "compare_quick")


@functools.cache
def slow(method):
    """The distances of the slow cases of a method, by case."""
    cases = [case for case in SLOW if case[2] == method]
    return dict(zip(cases, fake_devices.run(__file__, "compare_all", cases), strict=True))


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize(
    "case",
    [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda case: f"{case[0]}, {'gated' if case[1] else 'not gated'}, {case[2]}",
)
def test_equals_one_device(case, clips):
    found = quick()[0][QUICK.index(case)] if case in QUICK else slow(case[2])[case]
    distances = found[clips]
    assert len(distances) == 8 if case[1] else 7
    assert not np.isnan([*distances.values()]).any(), distances
    assert max(distances.values()) <= TOLERANCE, distances


@pytest.mark.parametrize("method", METHODS)
def test_states_are_handed_over_only_where_a_clip_fires(method):
    finite = fake_devices.run(__file__, "without_handing_over", method)
    assert finite == {clips: clips == "never" for clips in CLIPS}


@pytest.mark.parametrize("method", METHODS)
def test_only_states_travel_and_memory_is_split(method):
    if method == "chunked":
        found = quick()[1]
    else:
        found = fake_devices.run(__file__, "programs", PROGRAMS, method)
    (few, _), (many, memory), (_, split_memory) = found
    assert {kind for _, kind in few} == {"all-gather", "all-reduce", "collective-permute"}
    assert few == many
    assert split_memory < memory / 2


if __name__ == "__main__":
    fake_devices.main(compare_quick, compare_all, without_handing_over, programs)
