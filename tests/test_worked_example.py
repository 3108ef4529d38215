"""What `tests/worked_example.py` registers by one line each works without edits anywhere else."""

import contextlib
import importlib
import json
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod import models
from spectral_pod.analysis.flops import train_flops
from spectral_pod.data import tasks
from spectral_pod.errors import ConfigError
from spectral_pod.generate import export
from spectral_pod.generate.decode import Decoder
from spectral_pod.generate.restore import one_device, restore_for_inference
from spectral_pod.generate.text import continuations
from spectral_pod.layers.block import unstack
from spectral_pod.layers.mixers import MIXERS
from spectral_pod.layers.parameter import groups
from spectral_pod.models.model import abstract_params, init_params
from spectral_pod.objectives import NextByte
from spectral_pod.ops.online_conv import BLOCK
from spectral_pod.parallel.mesh import AXES
from spectral_pod.train.optim import OPTIMIZERS
from spectral_pod.validation import validate, validate_mesh
from tests import trainer

CONFIG = "tests/worked_example.py"


@pytest.fixture(scope="module", autouse=True)
def example():
    """The registrations of the example, which are hidden from other tests."""
    with contextlib.ExitStack() as stack:
        for registry in (MIXERS, tasks.TASKS, OPTIMIZERS, NextByte.evaluation_metrics):
            stack.enter_context(mock.patch.dict(registry))
        yield importlib.import_module("tests.worked_example")


def config_of(example, **fields):
    config = example.get_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a run by the command line, with both options of the task as flags."""
    folder = tmp_path_factory.mktemp("example") / "run"
    options = ("data.options.step=3", "data.options.length=20")
    trainer.run(trainer.command(folder, *options, config=CONFIG))
    return folder


def test_it_trains(workdir):
    result, lines = trainer.result(workdir), trainer.metrics(workdir)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]
    assert result["operations"] == {"power_law": "dense", "delta_rule": "chunked"}
    assert {"grad_norm/blocks.dynamics", "param_norm/blocks.dynamics"} <= lines[0].keys()
    assert lines[0]["clipped_writes"] == 0  # of its delta memory


def test_its_metric_is_reported(workdir):
    confidence = trainer.result(workdir)["eval"]["confidence"]
    assert 0 < confidence < 1
    validations = [line for line in trainer.metrics(workdir) if "validation/loss" in line]
    assert all(0 < line["validation/confidence"] < 1 for line in validations)
    assert len(validations) == 2


def test_the_options_of_its_task_are_flags(workdir, tmp_path):
    """This holds for options that the config file does not mention."""
    recorded = json.loads((workdir / "config.json").read_text())["config"]["data"]
    assert recorded["options"] == {"step": 3, "length": 20}
    wrong = trainer.command(tmp_path / "run", "data.options.stp=3", config=CONFIG)
    message = trainer.run(wrong, code=2).stderr
    assert "config.data.options.stp is unknown to count" in message
    assert "did you mean 'step'" in message
    wrong = trainer.command(tmp_path / "run", "data.options.step=0", config=CONFIG)
    assert "options.step is 0; it must be at least 1" in trainer.run(wrong, code=2).stderr


def test_its_fields_are_checked(example):
    validate(config_of(example))
    for field, value, message in (
        ("model.power_law.groups", 0, "power_law.groups is 0; it must be at least 1"),
        ("model.power_law.groups", 3, "hidden_dim is 16, not divisible by .*power_law.groups = 3"),
        ("model.power_law.groups", 128, "not divisible by .*power_law.groups = 128"),
        ("optimizer.name", "sign_momentun", "did you mean 'sign_momentum'"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(config_of(example, **{field: value}))


def test_it_is_validated_on_meshes(example):
    sizes = {"mesh.data": 1, "mesh.tensor": 2, "model.memory.num_heads": 2}
    assert validate_mesh(config_of(example, **sizes), 2) == dict(zip(AXES, (1, 1, 1, 2)))
    with pytest.raises(ConfigError, match=r"groups is 2, not divisible by mesh\.tensor = 4"):
        validate_mesh(
            config_of(example, **{"mesh.tensor": 4, "mesh.data": 1, "model.memory.num_heads": 4}), 4
        )
    narrow = {"mesh.sequence": 24, "mesh.data": 1, "model.power_law.reach": 5}
    with pytest.raises(ConfigError, match="leaves a device 1 positions; power_law looks 5 back"):
        validate_mesh(config_of(example, **narrow), 24)


def model_of(config, **options):
    return models.build(config, seq_len=config.data.seq_len, num_classes=256, **options)


def test_its_flops_are_counted(example):
    """There are N^2 D products per sequence and layer, in addition to those of Dense layers."""
    config = config_of(example, **{"model.pattern": ("power_law",)})
    params = nn.unbox(abstract_params(model_of(config), one_device()))
    B, N, D, layers = 8, 24, 16, 2
    dense = layers * 2 * B * N * D * D * (1 + 3)  # its own projection and the channel mixer
    head = 2 * B * N * D * 256
    sums = layers * 2 * B * N * N * D
    assert train_flops(config, params, 256) == pytest.approx(3 * (dense + head + sums), rel=0.02)


def test_its_parameters_are_in_the_groups_that_they_declare(example):
    tree = groups(abstract_params(model_of(config_of(example)), one_device()))
    found = {path[-1].key: group for path, group in jax.tree_util.tree_leaves_with_path(tree)}
    assert (found["power"], found["kernel"], found["bias"]) == ("dynamics", "decayed", "undecayed")


@pytest.mark.parametrize("prompt", [0, BLOCK])
def test_it_decodes_exactly(example, prompt):
    """Both after a prompt and from the state before the first position."""
    length = 3 * BLOCK
    config = config_of(example, **{"data.seq_len": length})
    model, decoding = model_of(config), model_of(config, decoding=True)
    params = nn.unbox(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, length)), jnp.int32)
    whole = jax.jit(model.apply)({"params": params}, tokens, jnp.ones(tokens.shape, bool))
    decoder = Decoder(decoding, unstack(params), tokens[:, :prompt], num_positions=length - prompt)
    if prompt:
        np.testing.assert_allclose(decoder.logits_BC, whole[:, prompt - 1], atol=1e-4)
    for start in range(prompt, length, BLOCK):
        logits = decoder.force(tokens[:, start : start + BLOCK])
        np.testing.assert_allclose(logits, whole[:, start : start + BLOCK], atol=1e-4)


def test_it_writes_and_is_exported(workdir, tmp_path):
    trained = restore_for_inference(str(workdir))
    export.save(trained, str(tmp_path / "export"))
    again = export.load(str(tmp_path / "export"))
    jax.tree.map(np.testing.assert_array_equal, trained.params, again.params)
    with jax.set_mesh(trained.mesh):
        texts = [
            b"".join(piece for (piece,) in continuations(one, [b"\1\4\7"], num_bytes=5))
            for one in (trained, again)
        ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 5
