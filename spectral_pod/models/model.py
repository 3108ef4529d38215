"""The interface of a model: one class, which declares all that the rest of the project needs."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spectral_pod.layers.architecture import Architecture
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.parallel.sharding import num_shards


class Model(nn.Module):
    """The base of all models.

    Attributes:
      config: its resolved architecture.
      num_classes: C, the number of logits.
    """

    config: Architecture
    num_classes: int

    mixer: ClassVar[str]  # the mixer of its blocks, unless the configuration has a pattern
    reads_patches: ClassVar[bool] = False  # of `model.patch.stride` bytes each, rather than bytes
    causal: ClassVar[bool]
    max_documents: ClassVar[int] = 1  # per record
    has_consistency_loss: ClassVar[bool] = False


def init_params(model: Model, key: jax.Array, rows: int = 1) -> Any:
    """The initial parameters of training, boxed; the batch's shards must divide `rows`."""
    config = model.config
    shape = rows, config.documents * config.max_positions * config.stride
    tokens_BL = jnp.zeros(shape, jnp.int32)
    return model.init(key, tokens_BL, jnp.ones(shape, bool))["params"]


@functools.lru_cache(maxsize=8)  # tracing takes seconds, and several parts of a run need this
def abstract_params(model: Model, mesh: Mesh) -> Any:
    """The parameters of `init_params` as boxed `jax.ShapeDtypeStruct`s; allocates nothing."""
    with on_mesh(mesh):
        rows, key = num_shards("batch"), jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(functools.partial(init_params, model, rows=rows), key)
