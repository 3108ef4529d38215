"""A new mixer that cannot be causal, and the messages about mistakes in such a mixer."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive
from spectral_pod.generate.restore import one_device
from spectral_pod.layers.mixer import Mixer, option, shared
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.parameter import parameter
from spectral_pod.train.optim import make_optimizer
from spectral_pod.validation import validate


class Mean(Mixer):
    """The mean of all valid positions, scaled."""

    kind: Literal["plain", "scaled"] = option("name", "scaled")
    start: float = 1.0
    dropout: float = shared("dropout", 0.0)

    section = "mean"
    can_be_causal = False

    @nn.compact
    def __call__(self, x_BND, mask_BN):
        assert self.dropout == 0.25
        mask_BN1 = mask_BN[..., None].astype(x_BND.dtype)
        mean_B1D = jnp.sum(x_BND * mask_BN1, 1, keepdims=True) / jnp.sum(mask_BN1, 1, keepdims=True)
        if self.kind == "scaled":
            init = parameter(nn.initializers.constant(self.start), "width", group="dynamics")
            mean_B1D *= self.param("scale", init, (self.width,))[None, None].astype(x_BND.dtype)
        return jnp.broadcast_to(mean_B1D, x_BND.shape).astype(self.dtype)


def registered(monkeypatch, mixer, **fields):
    """A configuration with the mixer, registered under the name 'own'."""
    monkeypatch.setitem(MIXERS, "own", mixer)
    config = default()
    small = {
        "data.task": "listops", "data.seq_len": 32, "model.pattern": ("own",),
        "model.num_layers": 1, "model.hidden_dim": 8, "model.embed_dim": 4, "model.dropout": 0.25,
    }  # fmt: skip
    config.update_from_flattened_dict(small | fields)
    return config


def test_it_is_part_of_a_model(monkeypatch):
    config = registered(monkeypatch, Mean, **{"model.mean.start": 2})
    validate(config)
    assert (config.model.mean.name, config.model.mean.start) == ("scaled", 2.0)
    model = models.build(config, seq_len=32, num_classes=10)
    tokens = jnp.ones((2, 32), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens, tokens > 0)["params"]
    box = params["blocks"]["block_0"]["own"]["scale"]
    np.testing.assert_array_equal(box.value, 2.0)
    groups = make_optimizer(config, model, one_device()).groups
    assert groups["blocks"]["block_0"]["own"]["scale"] == "dynamics"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.mean.name": "scald"}, "model.mean.name is 'scald'.*did you mean 'scaled'"),
        ({"model.name": "spectral_gpt", "data.task": "lm"}, "'own', which sees the whole sequence"),
        ({"model.pattern": ("own+spectral+own",)}, "'own.spectral.own', which names a mixer twice"),
    ],
)
def test_its_options_are_checked(monkeypatch, fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(registered(monkeypatch, Mean, **fields))


class NoSection(Mixer):
    size: Positive = 1


class SectionOfAField(NoSection):
    section = "dropout"


class OtherDefault(Mixer):
    num_heads: Positive = 8
    section = "attention"


class UnknownShared(Mixer):
    filter: str = shared("hyena.filtr", "explicit")


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (NoSection, "NoSection.section is ''; .* need a section"),
        (SectionOfAField, "SectionOfAField.section is 'dropout'; .* no field of config.model"),
        (OtherDefault, "OtherDefault states config.model.attention.num_heads otherwise"),
        (UnknownShared, "asks for config.model.hyena.filtr"),
    ],
)
def test_a_mistake_of_its_author_is_one_message(monkeypatch, mixer, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(registered(monkeypatch, mixer))
    assert "\n" not in str(caught.value)
