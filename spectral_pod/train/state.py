"""The training state: what a checkpoint holds, and how it comes to be, sharded from the start."""

import hashlib
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from spectral_pod.parallel.sharding import tree_shardings


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes in training; the data position and the rngs follow from `step`."""

    step: jax.Array  # int32 []: optimizer steps taken
    params: Any  # float32
    opt_state: Any


def _initial(
    key: jax.Array, model: nn.Module, tx: optax.GradientTransformation, rows: int, seq_len: int
) -> TrainState:
    tokens_BL = jnp.zeros((rows, seq_len), jnp.int32)
    params = model.init(key, tokens_BL, jnp.ones(tokens_BL.shape, bool))["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def abstract_state(
    model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, seq_len: int
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with their shardings; allocates nothing."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(lambda key: _initial(key, model, tx, rows, seq_len), _KEY_SHAPE)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nn.unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def init_state(
    model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, seq_len: int, seed: int
) -> TrainState:
    """The state of step 0; each device computes its own shards, no array is ever whole."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh, seq_len))

    def init(key: jax.Array) -> TrainState:
        return nn.unbox(_initial(key, model, tx, rows, seq_len))

    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def params_digest(params: Any) -> str:
    """sha256 over the bytes of all parameters, in the order of their names; of all processes."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(leaves):
        whole = multihost_utils.process_allgather(leaves[name], tiled=True)
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()


_KEY_SHAPE = jax.eval_shape(lambda: jax.random.key(0))
