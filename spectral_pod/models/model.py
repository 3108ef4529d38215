"""The interface of a model: one class, which declares all that the rest of the project needs."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spectral_pod.layers.architecture import Architecture
from spectral_pod.layers.block import unstack
from spectral_pod.layers.probes import PROBES
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

    @property
    def pools(self) -> bool:
        """Whether there is one vector of logits a row, rather than one a position."""
        return not self.causal and self.config.pooling != "none"


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


def probed(
    model: Model, variables: Any, tokens_BL: jax.Array, mask_BL: jax.Array
) -> dict[str, jax.Array]:
    """What the layers of a model show of themselves (`layers/probes.py`) on rows, without dropout.

    Of a model that reads chunks, on the first chunk of the rows.

    Returns:
      The summaries, float32, by names such as 'input_rms', 'layer_0/rms', 'layer_0/spectral_rms'
      and 'layer_0/spectral/energy_gate'.
    """
    if model.config.chunk:
        tokens_BL, mask_BL = (x[:, : model.config.chunk] for x in (tokens_BL, mask_BL))
    _, sown = model.apply(variables, tokens_BL, mask_BL, mutable=[PROBES])
    leaves = jax.tree_util.tree_leaves_with_path(unstack(sown[PROBES]))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
