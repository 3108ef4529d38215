"""What a model is: one class, which says all that the rest of the project asks of it."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spectral_pod.layers.architecture import Architecture
from spectral_pod.parallel.sharding import num_shards


class Model(nn.Module):
    """The base of all models.

    Attributes:
      config: what the model is made of.
      num_classes: C, of its logits.
    """

    config: Architecture
    num_classes: int

    mixer: ClassVar[str]  # of its blocks, unless the configuration gives a pattern
    bytes_per_position: ClassVar[int]
    causal: ClassVar[bool]
    max_documents: ClassVar[int] = 1  # in a record


def init_params(model: Model, key: jax.Array, rows: int = 1) -> Any:
    """The parameters that training starts with, boxed; `rows` is a multiple of the mesh's."""
    config = model.config
    shape = rows, config.documents * config.max_positions * model.bytes_per_position
    tokens_BL = jnp.zeros(shape, jnp.int32)
    return model.init(key, tokens_BL, jnp.ones(shape, bool))["params"]


@functools.lru_cache(maxsize=8)  # tracing takes seconds, and several parts of a run ask
def abstract_params(model: Model, mesh: Mesh) -> Any:
    """The same as `jax.ShapeDtypeStruct`s in the boxes in which they were declared."""
    with jax.set_mesh(mesh):
        rows, key = num_shards("batch"), jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(functools.partial(init_params, model, rows=rows), key)
