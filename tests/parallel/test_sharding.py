"""The sharding rules: they cover every parameter, and none is silently unsharded or split twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from spectral_pod import models
from spectral_pod.config import default
from spectral_pod.errors import ConfigError
from spectral_pod.generate.restore import one_device
from spectral_pod.parallel import mesh as mesh_lib
from spectral_pod.parallel.mesh import make_mesh
from spectral_pod.parallel.sharding import RULES, shard_op, spec
from spectral_pod.train.optim import make_optimizer
from spectral_pod.train.state import abstract_state


def test_unknown_axes_and_collisions_are_refused():
    assert spec("batch", None, "channel") == PartitionSpec(("data", "fsdp"), None, "tensor")
    with pytest.raises(KeyError):
        spec("batches")
    with pytest.raises(ValueError, match="twice"):
        spec("channel", "head")
    with pytest.raises(ValueError, match="twice"):
        spec("batch", "embed")


def test_axes_are_named_once():
    names = [name for name, _ in RULES]
    assert len(names) == len(set(names))


def test_without_a_mesh_an_operation_is_itself():
    def double(x):
        return 2 * x

    assert shard_op(double, [("batch",)], ("batch",)) is double


@pytest.mark.parametrize("parametrization", ["frequency", "time"])
def test_every_large_parameter_is_split(parametrization):
    config = default()
    config.model.spectral.parametrization = parametrization
    config.model.memory.method = "recurrent"  # traced fastest, with the same parameters
    mesh = make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}, jax.devices()[:1])
    for name in models.MODELS:
        config.model.name = name
        model = models.build(config, seq_len=256, num_classes=10)
        state = abstract_state(model, make_optimizer(config, model, mesh).tx, mesh)
        whole = [
            jax.tree_util.keystr(path)
            for path, x in jax.tree_util.tree_leaves_with_path(state)
            if x.size >= 10_000 and not any(x.sharding.spec)
        ]
        assert whole == []
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
        assert len(moments) == 2 * len(jax.tree.leaves(state.params))


def test_a_sharded_operation_is_the_plain_one():
    mesh = make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}, jax.devices()[:1])
    x = jnp.arange(8.0).reshape(2, 4)
    with jax.set_mesh(mesh):
        y = shard_op(jnp.sin, [("batch", "channel")], ("batch", "channel"))(x)
    np.testing.assert_array_equal(y, jnp.sin(x))


def test_versions_that_deadlock_on_cpus_are_refused(monkeypatch):
    monkeypatch.setattr(mesh_lib.jaxlib, "__version__", "0.11.2")
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(ConfigError, match=r"jaxlib 0\.11\.2 is installed, whose FFTs can wait"):
        one_device()
    monkeypatch.setenv("XLA_FLAGS", "--a --xla_cpu_multi_thread_eigen=false")
    assert one_device().size == 1
