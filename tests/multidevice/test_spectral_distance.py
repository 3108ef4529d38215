"""The distance between spectra is the same on every mesh, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectral_pod.ops.log_spectra import log_spectral_distance
from tests.multidevice import fake_devices

pytestmark = pytest.mark.slow

B, N, D = 8, 96, 16
MESHES = ("data=2 fsdp=2 tensor=2", "data=4", "sequence=4 tensor=2", "data=2 sequence=2 tensor=2")


def differences(meshes):
    """For each mesh: largest differences to one device over largest values."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, B, N, D)).astype(np.float32)
    mask = np.arange(N)[None] < rng.integers(1, N + 1, B)[:, None]
    weights = rng.normal(size=B).astype(np.float32)

    @jax.jit
    def run(x, y):
        distance, pullback = jax.vjp(lambda x, y: log_spectral_distance(x, y, mask), x, y)
        return (distance, *pullback(jnp.asarray(weights)))

    def on(sizes):
        with jax.set_mesh(fake_devices.mesh_of(sizes)):
            return jax.device_get(run(x, y))

    expected = on("")
    return [
        [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(on(sizes), expected)]
        for sizes in meshes
    ]


def test_distances_and_gradients_agree():
    for mesh, found in zip(MESHES, fake_devices.run(__file__, "differences", MESHES)):
        assert found == pytest.approx([0, 0, 0], abs=1e-5), mesh


if __name__ == "__main__":
    fake_devices.main(differences)
