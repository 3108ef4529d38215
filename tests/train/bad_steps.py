"""The config of `test_bad_steps.py`: the batch of step 8 is poisoned; with seed 1 all after it."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from tests import trainer


def get_config() -> ConfigDict:
    from spectral_pod import objectives
    from spectral_pod.train import step

    cross_entropy = objectives.cross_entropy

    def poisoned(logits, labels, smoothing):
        # `poisoned.step` is set while a training step is traced; evaluations stay as they are.
        loss = cross_entropy(logits, labels, smoothing)
        return loss if poisoned.step is None else jnp.where(poisoned.step, jnp.nan, loss)

    poisoned.step = None
    train_step = step.train_step

    def poisoned_step(state, batch, **options):
        last = state.step + 1 >= 8 if options["config"].seed else state.step + 1 == 8
        poisoned.step = last
        try:
            return train_step(state, batch, **options)
        finally:
            poisoned.step = None

    objectives.cross_entropy, step.train_step = poisoned, poisoned_step
    c = trainer.get_config()
    c.train.grad_accumulation = 1
    c.train.log_every_steps = 1
    return c
