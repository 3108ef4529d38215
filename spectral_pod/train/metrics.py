"""Norms of parameters and gradients, by group."""

from typing import Any

import jax
import jax.numpy as jnp

from spectral_pod.train.optim import DYNAMICS, leaf_name


def group_of(path: Any) -> str:
    """The reported group of a parameter: its top-level module, dynamics apart."""
    top = str(path[0].key)
    return f"{top}.dynamics" if leaf_name(path) in DYNAMICS else top


def norms(tree: Any) -> dict[str, jax.Array]:
    """The Euclidean norm of each parameter group of a tree of parameters or gradients."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        group = group_of(path)
        squares[group] = squares[group] + total if group in squares else total
    return {group: jnp.sqrt(total) for group, total in squares.items()}
