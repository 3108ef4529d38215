"""Dropout has the random bits of JAX's own generator, on every mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.layers.dropout import Dropout
from spectral_pod.ops.random_bits import bernoulli, flat_indices, threefry
from tests.multidevice import fake_devices

SHAPE = (8, 16, 8)
MESHES = ("", "data=8", "data=2 fsdp=2 tensor=2", "sequence=8", "fsdp=2 sequence=2 tensor=2")
AXES = (("batch", "position", "width"), ("batch", "position", "hidden"))


# ---- in a process with fake devices


def equal(meshes):
    """For each mesh and layout, whether the bits are those of JAX on one device."""
    key = jax.random.key(3)
    expected = np.asarray(jax.random.bernoulli(key, 0.75, SHAPE))

    def on(sizes, axes):
        with jax.set_mesh(fake_devices.mesh_of(sizes)):
            made = jax.jit(lambda key: bernoulli(key, 0.75, SHAPE, axes))(key)
        return bool((np.asarray(made) == expected).all())

    return [[on(sizes, axes) for axes in AXES] for sizes in meshes]


# ---- tests


def test_the_bits_are_those_of_jax_on_every_mesh():
    assert fake_devices.run(__file__, "equal", MESHES) == [[True, True]] * len(MESHES)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 1 / 3, 0.9, 1 - 2**-23, 1.0])
def test_probabilities(p):
    key, shape = jax.random.key(5), (256, 128)
    made = bernoulli(key, p, shape, ("batch", None))
    np.testing.assert_array_equal(made, jax.random.bernoulli(key, p, shape))


def test_vectors_of_the_authors():
    """Known answers of Random123 for 20 rounds: zeros, ones, and digits of pi."""
    for counter, key, expected in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ]:
        assert tuple(map(int, threefry(*map(jnp.uint32, key + counter)))) == expected


def test_bits_are_made_where_they_are_used():
    """Neither counters nor bits are kept in memory, which would be many times as much as x."""
    x = jax.ShapeDtypeStruct((4, 512, 64), jnp.float32)
    layer = Dropout(0.1, deterministic=False)

    def loss(x, key):
        for _ in range(8):
            key, own = jax.random.split(key)
            x = jnp.sin(layer.apply({}, x, rngs={"dropout": own}))
        return x.sum()

    def temporaries(rate):
        nonlocal layer
        layer = Dropout(rate, deterministic=False)
        compiled = jax.jit(jax.grad(loss)).lower(x, jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    masks = 8 * 4 * 512 * 64  # a byte an element
    assert temporaries(0.1) <= temporaries(0.0) + masks + 4096


@pytest.mark.parametrize("shape", [(3, 5), (70_000, 70_000, 9), (2**20, 2**20, 2**20)])
def test_indices_of_large_arrays(shape):
    """Of the last elements, which are beyond 32 bits."""
    local = tuple(min(size, 3) for size in shape)
    starts = [size - own for size, own in zip(shape, local)]
    high, low = flat_indices(shape, [jnp.uint32(x) for x in starts], local)
    places = np.meshgrid(*map(np.arange, starts, shape), indexing="ij")
    expected = np.zeros(local, object)
    for place, size in zip(places, shape):
        expected = expected * size + place.astype(object)
    found = np.asarray(high, np.uint64).astype(object) * 2**32 + np.asarray(low).astype(object)
    assert (found == expected % 2**64).all()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("deterministic", [False, True])
def test_equals_flax(rate, deterministic):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 8)), jnp.float32)
    ours, theirs = (
        cls(rate, deterministic=deterministic).apply({}, x, rngs={"dropout": jax.random.key(7)})
        for cls in (Dropout, nn.Dropout)
    )
    np.testing.assert_array_equal(ours, theirs)


if __name__ == "__main__":
    fake_devices.main(equal)
