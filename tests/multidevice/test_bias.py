"""On TPUs each device sums its own rows for the gradient of a bias, the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops import affine
from tests.multidevice import fake_devices

MESHES = ("", "data=2 fsdp=2 tensor=2", "sequence=4 tensor=2", "data=8")


def errors(meshes):
    """For each mesh: largest errors of the sum and both gradients over the largest values."""
    affine.platform = lambda: "tpu"
    rng = np.random.default_rng(0)
    y, dy = (np.asarray(jnp.bfloat16(x)) for x in rng.normal(size=(2, 8, 12, 2, 16)))
    bias = np.asarray(jnp.bfloat16(rng.normal(size=(2, 16))))
    axes = ("batch", "position", None, "hidden")

    @jax.jit
    def run(y, bias, dy):
        total, pullback = jax.vjp(lambda y, bias: affine.add_bias(y, bias, axes), y, bias)
        return total, *pullback(dy)

    exact = [x.astype(np.float64) for x in (y, bias, dy)]
    exact = exact[0] + exact[1], exact[2], exact[2].sum((0, 1))
    found = []
    for sizes in meshes:
        with jax.set_mesh(fake_devices.mesh_of(sizes)):
            results = jax.device_get(run(y, bias, dy))
        pairs = zip(results, exact, strict=True)
        found.append([float(np.abs(np.float64(a) - b).max() / np.abs(b).max()) for a, b in pairs])
    return found


def test_equals_float64():
    for mesh, found in zip(MESHES, fake_devices.run(__file__, "errors", MESHES), strict=True):
        assert found == pytest.approx([0, 0, 0], abs=1e-2), mesh


if __name__ == "__main__":
    fake_devices.main(errors)
