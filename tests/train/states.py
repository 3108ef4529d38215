"""States whose bytes say their step, their checkpoints, and damage to these."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from spectral_pod.train.checkpoint import Checkpointer


class State(flax.struct.PyTreeNode):
    step: jax.Array
    params: Any
    opt_state: Any


def make_state(step, kilobytes=1):
    """A state whose bytes are determined by the step."""
    rng = np.random.default_rng(step)
    params = {
        "dense": {"kernel": rng.normal(size=(16 * kilobytes, 16)).astype(np.float32)},
        "half": rng.normal(size=(8, 4)).astype(jnp.bfloat16),
        "spectrum": (rng.normal(size=(4, 4)) + 1j * rng.normal(size=(4, 4))).astype(np.complex64),
        "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.adam(1e-3))
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(params))
    return jax.device_put(State(np.int32(step), params, opt_state), jax.devices()[0])


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        assert got.sharding == want.sharding
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def open_checkpointer(directory, keep_latest=3, keep_best=0, **options):
    return Checkpointer(str(directory), keep_latest=keep_latest, keep_best=keep_best, **options)


def write(directory, *steps, run=""):
    with open_checkpointer(directory, run=run) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), None)


def restored_step(directory, run=""):
    """Restores, checks that the content belongs to the restored step, and returns the step."""
    with open_checkpointer(directory, run=run) as checkpointer:
        state = checkpointer.restore(abstract(make_state(0)))
    if state is None:
        return None
    assert_same(state, make_state(int(state.step)))
    return int(state.step)


def files_of(step_directory):
    return sorted(path for path in step_directory.rglob("*") if path.is_file())


def steps_in(directory):
    return {int(path.name) for path in directory.iterdir()}


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])
