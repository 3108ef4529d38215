"""The wavelet transforms against PyWavelets, and the causal one against a float64 loop."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from spectral_pod.ops import reference
from spectral_pod.ops.wavelet import (
    Boundary,
    causal_wavedec,
    dwt,
    idwt,
    reach,
    wavedec,
    waverec,
)

WAVELETS = [
    *(f"db{order}" for order in range(1, 9)),
    *(f"sym{order}" for order in range(2, 9)),
    *(f"coif{order}" for order in range(1, 6)),
]
MODES = typing.get_args(Boundary)
DETAILS = ["difference", "high_pass"]
# Relative to the largest entry. Measured: at most 6e-16 and 3e-7.
TOLERANCE = {np.float64: 1e-13, np.float32: 1e-6}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_transform_equals_pywavelets(N, wavelet, mode, dtype):
    """Tests both directions on arbitrary coefficients, so that errors at the ends are seen, too."""
    x_BND = random(2, N, 3)
    wanted = pywt.dwt(x_BND, wavelet, mode, axis=1)
    c = random(2, *wanted[0].shape, seed=1)
    with jax.enable_x64(dtype == np.float64):
        both = jax.jit(lambda x, a, d: (dwt(x, wavelet, mode), idwt(a, d, wavelet, mode)))
        (a_BND, d_BND), back_BND = both(*(y.astype(dtype) for y in (x_BND, *c)))
    assert a_BND.dtype == d_BND.dtype == back_BND.dtype == dtype
    for actual, expected in zip((a_BND, d_BND), wanted):
        assert actual.shape == expected.shape
        error = np.abs(np.asarray(actual) - expected).max()
        assert error <= TOLERANCE[dtype] * np.abs(wanted).max()
    assert_close(back_BND, pywt.idwt(*c, wavelet, mode, axis=1), TOLERANCE[dtype])


def test_the_modes_are_those_of_pywavelets():
    assert sorted(MODES) == sorted(pywt.Modes.modes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("N", [1, 2, 3, 5, 12, 33])
def test_every_mode_equals_pywavelets_at_every_length(mode, N):
    if N == 1 and mode.endswith("reflect"):
        with pytest.raises(ValueError, match="one position"):
            dwt(jnp.zeros((1, 1, 1)), "db4", mode)
        return
    assert_transform_equals_pywavelets(N, "db4", mode, np.float64 if N % 3 else np.float32)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_every_wavelet_equals_pywavelets(wavelet):
    assert_transform_equals_pywavelets(19, wavelet, "symmetric", np.float32)
    assert_transform_equals_pywavelets(20, wavelet, "periodization", np.float64)


@pytest.mark.parametrize("mode", ["symmetric", "periodization", "antireflect"])
@pytest.mark.parametrize("N", [27, 40])
def test_levels_equal_pywavelets_and_invert(mode, N):
    x_BND = random(2, N, 3)

    @jax.jit
    def there_and_back(x_BND):
        coefficients = wavedec(x_BND, "sym2", 3, mode)
        return coefficients, waverec(coefficients, "sym2", mode)

    coefficients, back_BND = there_and_back(np.float32(x_BND))
    expected = pywt.wavedec(x_BND, "sym2", mode, 3, axis=1)
    for c_BND, expected_BND in zip(coefficients, expected, strict=True):
        assert_close(c_BND, expected_BND, 2e-6)
    assert_close(back_BND, pywt.waverec(expected, "sym2", mode, axis=1), 2e-6)
    assert_close(back_BND[:, :N], x_BND, 2e-6)


def test_bfloat16_is_transformed_in_float32():
    x_BND = random(1, 16, 2).astype(jnp.bfloat16)
    a_BND, expected_BND = jax.jit(lambda *xs: [dwt(x, "db2")[0] for x in xs])(
        x_BND, x_BND.astype(np.float32)
    )
    assert a_BND.dtype == jnp.bfloat16
    assert expected_BND.dtype == jnp.float32
    np.testing.assert_array_equal(a_BND, np.asarray(expected_BND).astype(jnp.bfloat16))


transform = jax.jit(causal_wavedec, static_argnums=(1, 2, 3))


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize(("wavelet", "N"), [("db1", 1), ("db4", 61), ("sym5", 16), ("coif2", 33)])
def test_causal_transform_equals_the_float64_loop(wavelet, N, detail):
    x_BND = random(2, N, 3)
    bank = pywt.Wavelet(wavelet)
    low, high = np.array(bank.rec_lo) / np.sqrt(2), np.array(bank.rec_hi) / np.sqrt(2)
    expected = reference.causal_wavedec(x_BND, low, 3, None if detail == "difference" else high)
    for dtype in (np.float64, np.float32):
        with jax.enable_x64(dtype == np.float64):
            actual = transform(x_BND.astype(dtype), wavelet, 3, detail)
            for y_BND, expected_BND in zip(actual, expected, strict=True):
                error = np.abs(np.asarray(y_BND) - expected_BND).max()
                assert error <= TOLERANCE[dtype] * np.abs(x_BND).max()


@pytest.mark.parametrize("detail", DETAILS)
def test_causal_transform_equals_the_stationary_one_away_from_the_start(detail):
    """`pywt.swt` is circular, centred and has a gain of sqrt(2) per level: roll and scale it.

    It applies the analysis filters, which are ours reversed, so it gets the reversed filter bank.
    """
    levels, N = 3, 128
    bank = pywt.Wavelet("db4")
    swapped = pywt.Wavelet("swapped", (bank.rec_lo, bank.rec_hi, bank.dec_lo, bank.dec_hi))
    x_BND = random(2, N, 3)
    stationary = pywt.swt(x_BND, swapped, levels, axis=1)[::-1]  # fine to coarse
    a_BND, *details = map(np.asarray, transform(np.float32(x_BND), "db4", levels, detail))
    previous_BND, roll = x_BND, 0
    for level, (wide_BND, high_BND) in enumerate(stationary):
        roll += 2**level * (bank.dec_len // 2)
        gain = np.sqrt(2) ** (level + 1)
        smooth_BND = np.roll(wide_BND / gain, roll, axis=1)
        expected_BND = previous_BND - smooth_BND
        if detail == "high_pass":
            expected_BND = np.roll(high_BND / gain, roll, axis=1)
        interior = slice(reach("db4", level + 1), None)
        d_BND = details[levels - 1 - level]
        assert_close(d_BND[:, interior], expected_BND[:, interior], 2e-6)
        previous_BND = smooth_BND
    assert_close(a_BND[:, interior], previous_BND[:, interior], 2e-6)


def test_differences_sum_back_to_the_input_and_a_constant_stays():
    x_BND = np.float32(random(2, 80, 3))
    x_BND[1] = 1
    a_BND, *details = bands = list(map(np.asarray, transform(x_BND, "db4", 3)))
    assert_close(sum(bands), x_BND, 1e-6)
    settled = slice(reach("db4", 3), None)
    assert_close(a_BND[1, settled], np.ones((31, 3)), 1e-6)
    assert max(np.abs(d_BND[1, settled]).max() for d_BND in details) < 1e-6


def test_an_output_sees_its_reach_and_no_more():
    """The last outputs therefore follow from a window of the last inputs, as in decoding."""
    x_BND = np.float32(random(2, 90, 3))
    num_inputs = reach("db4", 3) + 1
    whole, window, short = (
        list(map(np.asarray, transform(x_BND[:, -count:], "db4", 3)))
        for count in (90, num_inputs, num_inputs - 1)
    )
    for y_BND, window_BND in zip(whole, window):
        assert_close(window_BND[:, -1], y_BND[:, -1], 1e-6)
    assert np.abs(short[0][:, -1] - whole[0][:, -1]).max() > 1e-9


@pytest.mark.parametrize("detail", DETAILS)
def test_the_future_has_exactly_zero_gradient(detail):
    x_BND, t = jnp.float32(random(1, 41, 2)), 17

    def output(x_BND):
        return sum(
            jnp.sum(jnp.sin(y_BND[:, t])) for y_BND in causal_wavedec(x_BND, "db4", 3, detail)
        )

    gradient_BND = jax.jit(jax.grad(output))(x_BND)
    assert not np.any(gradient_BND[:, t + 1 :])
    assert np.all(gradient_BND[:, t] != 0)


@pytest.mark.parametrize("detail", DETAILS)
def test_the_backward_pass_is_the_transpose_and_stores_no_activation(detail):
    op = functools.partial(causal_wavedec, wavelet="sym3", levels=2, detail=detail)
    x_BND, cotangents = np.float32(random(2, 23, 3)), tuple(np.float32(random(3, 2, 23, 3, seed=1)))
    y, backward = jax.jit(functools.partial(jax.vjp, op))(x_BND)
    forward_side = sum(np.vdot(a, b) for a, b in zip(y, cotangents, strict=True))
    backward_side = np.vdot(x_BND, jax.jit(backward)(cotangents)[0])
    assert forward_side == pytest.approx(backward_side, rel=1e-5)
    assert all(leaf.size <= 1 for leaf in jax.tree.leaves(backward))


def test_wavelets_and_coefficients_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not orthogonal"):
        causal_wavedec(jnp.zeros((1, 8, 1)), "bior2.2", 1)
    with pytest.raises(ValueError, match="Unknown wavelet"):
        dwt(jnp.zeros((1, 8, 1)), "db99x")
    with pytest.raises(ValueError, match="3 coefficients are fewer"):
        idwt(jnp.zeros((1, 3, 1)), jnp.zeros((1, 3, 1)), "db4")
