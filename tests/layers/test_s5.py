"""The initial state space of S5, against values of the published program."""

import jax
import numpy as np
import pytest

from spectral_pod.layers.s5 import S5Layer, hippo


@pytest.mark.parametrize(("size", "blocks"), [(8, 8), (12, 3), (16, 1)])
def test_eigenvalues_are_those_of_a_block_diagonal_hippo_matrix(size, blocks):
    """LegS (Gu et al. 2020) plus the term of rank one that makes it normal, in dense blocks."""
    n = np.arange(2 * size // blocks)
    p = np.sqrt(n + 0.5)
    legs = -np.tril(2 * np.outer(p, p)) + np.diag(n)
    normal = np.kron(np.eye(blocks), legs + np.outer(p, p))
    eigenvalues, vectors = hippo(size, blocks)
    np.testing.assert_allclose(normal @ vectors, vectors * eigenvalues, atol=1e-9)
    both = np.concatenate([eigenvalues, eigenvalues.conj()])
    expected = np.linalg.eigvals(normal)
    np.testing.assert_allclose(np.sort(both.imag), np.sort(expected.imag), atol=1e-6)
    np.testing.assert_allclose(both.real, -0.5)


# States, channels and blocks of the published recipes, and what the published program then has:
# the smallest and largest imaginary part, and the standard deviations of B and C.
PUBLISHED = {
    "ListOps": (8, 128, 8, 0.8660, 0.8660, 0.1779, 0.02186),
    "Text": (96, 256, 12, 0.3520, 80.966, 0.05114, 0.004499),
}
# The standard deviation of C of other recipes, 8 blocks of 16 states and 192 or 128 channels.
OTHER_C = {"trunc_standard_normal": (192, 256**-0.5), "complex_normal": (128, 0.5**0.5)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_starts_as_published(name):
    K, D, blocks, *expected = PUBLISHED[name]
    layer = S5Layer(D, state_dim=K, blocks=blocks)
    x, mask = np.zeros((1, 2, D), np.float32), np.ones((1, 2), bool)
    params = jax.jit(layer.init)(jax.random.key(0), x, mask)["params"]
    values = {name: np.asarray(box.value) for name, box in params.items()}
    imaginary = values["ssm_lambda"][1]
    found = imaginary.min(), imaginary.max(), values["ssm_b"].std(), values["readout"].std()
    np.testing.assert_allclose(found, expected, rtol=0.05)
    steps = np.exp(values["ssm_log_step"])
    assert 0.001 <= steps.min() <= steps.max() <= 0.1


@pytest.mark.parametrize("name", OTHER_C)
def test_other_initial_values_are_as_published(name):
    width, expected = OTHER_C[name]
    layer = S5Layer(width, state_dim=128, c_init=name, dt_min=1e-4)
    x, mask = np.zeros((1, 2, width), np.float32), np.ones((1, 2), bool)
    params = jax.jit(layer.init)(jax.random.key(0), x, mask)["params"]
    np.testing.assert_allclose(params["readout"].value.std(), expected, rtol=0.05)
    steps = np.exp(params["ssm_log_step"].value)
    assert 0.0001 <= steps.min() < 0.001 < steps.max() <= 0.1


def test_one_large_block_aliases():
    """Of 64 states, at step sizes of 0.001 to 0.1: the phase per step exceeds pi."""
    steps = np.geomspace(0.001, 0.1, 100)

    def aliased(blocks):
        return (np.abs(hippo(64, blocks)[0].imag)[:, None] * steps > np.pi).mean()

    assert aliased(1) > 0.2
    assert aliased(S5Layer.blocks) < 0.03
