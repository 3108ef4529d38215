"""A new mixer, task, metric and optimizer, each registered by one line.

`tests/test_worked_example.py` trains, decodes and exports with them. This file is also the config
of that run, `--config=tests/worked_example.py`; no other file names what is defined here.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics

from spectral_pod.config import default
from spectral_pod.data.tasks import TASKS, DrawnTask
from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative, Positive
from spectral_pod.layers.dense import Dense
from spectral_pod.layers.mixer import GrowingState, Mixer
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.parameter import parameter
from spectral_pod.objectives import NextByte
from spectral_pod.ops.choice import Choice
from spectral_pod.parallel.sharding import constrain, shard_op
from spectral_pod.train.optim import OPTIMIZERS


class Inputs(GrowingState):
    """All inputs so far, zero where a position is invalid or has not been read."""

    x_BND: jax.Array

    def extend(self, capacity):
        missing = capacity - self.x_BND.shape[1]
        return Inputs(jnp.pad(self.x_BND, ((0, 0), (0, missing), (0, 0))))


class PowerLaw(Mixer):
    """`W sum_{s <= t} (t - s + 1)^-p x_s` with a power p per group of channels.

    Attributes:
      groups: number of groups of adjacent channels.
      reach: positions that a device needs from the preceding one, if the mesh splits positions.
    """

    groups: Positive = 4
    reach: NonNegative = 1

    section = "power_law"
    divisible = (
        ("model.hidden_dim", "model.power_law.groups"),
        ("model.power_law.groups", "mesh.tensor"),
    )

    @classmethod
    def check(cls, config):
        if config.option("power_law.reach") >= config.max_positions:
            raise ConfigError("config.model.power_law.reach is not below the positions")

    @classmethod
    def halo(cls, config):
        return config.option("power_law.reach")

    @classmethod
    def methods(cls, config, batch):
        return {"power_law": Choice("dense", "it is the only one")}

    def setup(self):
        init = parameter(nn.initializers.ones_init(), None, group="dynamics")
        self.power_G = self.param("power", init, (self.groups,))
        self.out = Dense(self.width, ("hidden", "embed"), self.dtype)

    def __call__(self, x_BND, mask_BN):
        x_BND = jnp.where(mask_BN[..., None], x_BND, 0).astype(self.dtype)
        axes = ("batch", None, "channel")
        run = shard_op(self._sum, (axes, (None, None, "channel")), axes)
        y_BND = run(x_BND, self._weights(x_BND.shape[1]))
        return constrain(self.out(y_BND), "batch", "position", "width")

    def init_state(self, batch):
        return Inputs(jnp.zeros((batch, 0, self.width), self.dtype))

    def prefill(self, x_BPD, mask_BP):
        x_BPD = jnp.where(mask_BP[..., None], x_BPD, 0)
        return self(x_BPD, mask_BP), Inputs(x_BPD.astype(self.dtype))

    def advance(self, x_B1D, state, position):
        x_BND = jax.lax.dynamic_update_slice_in_dim(state.x_BND, x_B1D, position, axis=1)
        weights_NMD = self._weights(x_BND.shape[1])
        row_MD = jax.lax.dynamic_index_in_dim(weights_NMD, position, 0, keepdims=False)
        y_BD = jnp.einsum("bmd,md->bd", x_BND, row_MD)
        return self.out(y_BD[:, None]), Inputs(x_BND)

    def _weights(self, length):
        """[N, N, D], indexed by output and input position; zero for later inputs."""
        lag_NM = jnp.arange(length)[:, None] - jnp.arange(length)[None]
        power_D = jnp.repeat(self.power_G, self.width // self.groups)
        base_NM = jnp.maximum(lag_NM + 1, 1).astype(jnp.float32)
        weights_NMD = jnp.exp(-power_D[None, None] * jnp.log(base_NM)[..., None])
        return jnp.where(lag_NM[..., None] >= 0, weights_NMD, 0).astype(self.dtype)

    @staticmethod
    def _sum(x_BND, weights_NMD):
        return jnp.einsum("bmd,nmd->bnd", x_BND, weights_NMD)


@dataclasses.dataclass(frozen=True)
class Count(DrawnTask):
    """Counts from a random number in equal steps, modulo 256."""

    name = "count"
    version = 1
    objective = NextByte

    length: Positive = 24
    step: Positive = 1

    @property
    def max_length(self):
        return self.length

    def draw(self, rng):
        numbers = (rng.integers(200) + self.step * np.arange(self.length + 1)) % 256
        return numbers[:-1].astype(np.int32), numbers[1:].astype(np.int32)


def confidence(*, loss, **_):
    """The probability of the correct class."""
    return jnp.exp(-loss)


MIXERS["power_law"] = PowerLaw
TASKS["count"] = Count
NextByte.evaluation_metrics["confidence"] = metrics.Average.from_fun(confidence)
OPTIMIZERS["sign_momentum"] = lambda options, boxed: optax.scale_by_lion(options.b1, options.b2)


def get_config():
    c = default()
    c.data.task = "count"
    c.data.seq_len = 24
    c.model.name = "spectral_gpt"
    c.model.pattern = ("power_law", "power_law+delta")
    c.model.dtype = "float32"
    c.model.num_layers = 2
    c.model.hidden_dim = 16
    c.model.memory.head_dim = 4
    c.model.power_law.groups = 2
    c.optimizer.name = "sign_momentum"
    c.optimizer.learning_rate = c.optimizer.dynamics_learning_rate = 3e-3
    c.optimizer.warmup_steps = 2
    c.train.total_steps = 40
    c.train.global_batch_size = 8
    c.train.eval_batch_size = 8
    c.train.eval_records = 16
    c.train.eval_every_steps = 20
    c.train.sample_bytes = 4
    c.train.log_every_steps = 10
    c.train.compilation_cache = False  # that of all tests is used instead
    c.checkpoint.every_steps = 20
    return c
