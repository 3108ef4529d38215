"""Parameters of models, drawn here: to compile the initialisation of a model takes longer."""

import functools

import flax.linen as nn
import jax
import numpy as np

from spectral_pod.generate.restore import one_device
from spectral_pod.layers.parameter import Parameter
from spectral_pod.models.model import abstract_params, init_params

# What the values of a parameter lie around, if not 0, and how far from it, if not 0.1.
CENTRES = {
    "scale": 1.0, "energy_slope": 1.0, "level_weight": 1.0, "scale_memory": 0.1, "amplitude": 0.35,
    "log_decay": -1.4, "ssm_log_step": -3.5, "ssm_lambda": -0.5, "frequency": 4.0, "phase": 3.0,
}  # fmt: skip
SPREADS = {
    "embedding": 1.0, "filter": 0.7, "short_filter": 0.3, "query": 0.9, "skip": 1.0,
    "frequency": 2.0, "phase": 1.8,
}  # fmt: skip


def initial_params(model):
    """The parameters that training starts with."""
    return nn.unbox(jax.jit(functools.partial(init_params, model))(jax.random.key(0)))


def drawn_params(model, seed=0):
    return drawn(abstract_params(model, one_device()), seed)


def drawn_state(abstract, model, mesh, step=0):
    """A training state on a mesh, at `step`: drawn parameters, and zeros in the optimizer's state.

    Args:
      abstract: of `train.state.abstract_state`.
    """
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    params = drawn(abstract_params(model, mesh), seed=step)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.device_put(zeros.replace(step=np.int32(step), params=params), shardings)


def drawn(boxed, seed=0):
    """Parameters as large as initial ones, without their symmetries and zeros, float32 in NumPy.

    Args:
      boxed: a tree of `layers.parameter.Parameter`s, of which only the shapes are used.
    """
    rng = np.random.default_rng(seed)

    def draw(path, box):
        name, shape = path[-1].key, box.value.shape
        spread = SPREADS.get(name, 0.1)
        if box.inputs:  # a matrix, perhaps stacked by layer
            first = int(box.names[0] == "layer")
            spread = np.prod(shape[first : first + box.inputs]) ** -0.5
        return np.float32(CENTRES.get(name, 0.0) + spread * rng.normal(size=shape))

    return jax.tree_util.tree_map_with_path(draw, boxed, is_leaf=lambda x: isinstance(x, Parameter))
