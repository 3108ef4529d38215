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
from jax.sharding import Mesh, NamedSharding

from spectral_pod.models.model import Model, abstract_params, init_params
from spectral_pod.parallel.sharding import num_shards, replicated, tree_shardings


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes in training; the data position and the rngs follow from `step`."""

    step: jax.Array  # int32 []: optimizer steps taken
    params: Any  # float32
    opt_state: Any


def abstract_state(model: Model, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with their shardings; allocates nothing."""
    boxed = abstract_params(model, mesh)
    state = jax.eval_shape(lambda params: _started(params, tx), nn.unbox(boxed))
    params = tree_shardings(boxed, mesh)
    shardings = TrainState(
        replicated(mesh), params, _like_parameters(state.opt_state, state.params, params, mesh)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )


def init_state(model: Model, tx: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """The state of step 0; each device computes its own shards, no array is ever whole."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh))

    def init(key: jax.Array) -> TrainState:
        return _started(nn.unbox(init_params(model, key, num_shards("batch"))), tx)

    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def _started(params: Any, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def _like_parameters(opt_state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """The sharding of every array of an optimizer's state: that of the parameter whose path its own
    ends in and whose shape it has; what is like no parameter is small, and whole everywhere."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    of_parameter = {
        (path, x.shape): sharding
        for (path, x), sharding in zip(paths, jax.tree.leaves(shardings), strict=True)
    }

    def sharding(path: Any, x: Any) -> NamedSharding:
        suffixes = (of_parameter.get((path[i:], x.shape)) for i in range(len(path)))
        return next((found for found in suffixes if found is not None), replicated(mesh))

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def params_digest(params: Any) -> str:
    """sha256 over the bytes of all parameters, in the order of their names; of all processes."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(leaves):
        whole = multihost_utils.process_allgather(leaves[name], tiled=True)
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()
