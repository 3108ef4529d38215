"""The training state, which checkpoints contain, and its initialisation, sharded from the start."""

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

from spectral_pod.errors import NonFiniteError
from spectral_pod.models.model import Model, abstract_params, init_params
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.parallel.sharding import num_shards, replicated, tree_shardings
from spectral_pod.seeds import random_key


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes in training; the data position and the rngs follow from `step`."""

    step: jax.Array  # int32 []: optimizer steps taken
    params: Any  # float32
    opt_state: Any


def abstract_state(model: Model, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with their shardings; allocates nothing."""
    boxed = abstract_params(model, mesh)
    state = jax.eval_shape(lambda params: _initial(params, tx), nn.unbox(boxed))
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
    """The state of step 0; each device computes only its own shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, tx, mesh))

    def init(key: jax.Array) -> TrainState:
        return _initial(nn.unbox(init_params(model, key, num_shards("batch"))), tx)

    with on_mesh(mesh):
        return jax.jit(init, out_shardings=shardings)(random_key(seed))


def state_of(params: Any, tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """The state of step 0 of given parameters, which it does not share memory with."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    def start(params: Any) -> TrainState:
        # A result of a program that is its argument would be the same memory, and perhaps twice.
        return _initial(jax.tree.map(jnp.copy, params), tx)

    return jax.jit(start, out_shardings=shardings)(params)


def _initial(params: Any, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def _like_parameters(opt_state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """The shardings of an optimizer's state. An array whose path ends in that of a parameter of the
    same shape is sharded like the parameter; all others are small, and replicated."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    of_parameter = {
        (path, x.shape): sharding
        for (path, x), sharding in zip(paths, jax.tree.leaves(shardings), strict=True)
    }

    def sharding(path: Any, x: Any) -> NamedSharding:
        suffixes = (of_parameter.get((path[i:], x.shape)) for i in range(len(path)))
        return next((found for found in suffixes if found is not None), replicated(mesh))

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def check_finite(params: Any, what: str) -> None:
    """Checks the parameters that this process holds; `what` they are of begins the message.

    Raises:
      NonFiniteError: some are NaN or infinite.
    """
    broken = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if not all(np.isfinite(shard.data).all() for shard in x.addressable_shards)
    ]
    if broken:
        raise NonFiniteError(
            f"{what} holds parameters that are NaN or infinite, {', '.join(broken[:5])} among "
            f"{len(broken)} arrays; take an earlier step"
        )


def params_digest(params: Any) -> str:
    """sha256 of the bytes of all parameters in the order of their names; call on every process."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(params)}
    for name in sorted(leaves):
        whole = multihost_utils.process_allgather(leaves[name], tiled=True)
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()
