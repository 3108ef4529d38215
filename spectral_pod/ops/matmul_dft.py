"""Filtering in the frequency domain by matrix products, for the matrix units of accelerators.

A DFT of L = P Q points, with j = Q a + b and k = c + P d, is

    X[c + P d] = sum_b e^{-2 pi i b d / Q} e^{-2 pi i b c / L} sum_a e^{-2 pi i a c / P} x[Q a + b]:

products with two small DFT matrices around an elementwise product with twiddle factors (Gentleman
and Sande 1966). The second product may be factored again, for three factors. The inverse undoes the
steps in reverse order, so the bins are never reordered. Three savings: only a < ceil(N Q / L), as
the padding is zero; only c <= P / 2, as x is real; and the inverse computes the first N points
only. Spectra are real arrays with an axis of (real, imaginary) parts, which XLA lays out better
than complex numbers.

Precision: float32 inputs are multiplied in full float32 (Precision.HIGHEST); bfloat16 inputs as
bfloat16 operands with float32 sums, twiddle factors and filters.

Letters here: P, Q, R are the factors of L; C = P // 2 + 1; Z = 2 for the two parts.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

Factors = tuple[int, ...]

_STAGE_COST = 256  # cost of one pass over memory, in multiply-adds per point


def factors(num_points: int) -> Factors | None:
    """The two or three factors of least cost, or None if no factorization beats an FFT."""
    best: tuple[int, Factors] | None = None
    for p, q in _pairs(num_points):
        splits: list[Factors] = [(q,), *_pairs(q)]
        for rest in splits:
            cost = p + 4 * sum(rest) + _STAGE_COST * (1 + len(rest))
            if best is None or cost < best[0]:
                best = cost, (p, *rest)
    return best[1] if best and best[0] <= 4096 else None


def spectrum(taps_DT: jax.Array, factors: Factors) -> jax.Array:
    """The spectrum of real taps [D, T], T <= prod(factors), in the layout of `filter_real`."""
    return _dft(taps_DT.astype(jnp.float32)[None], factors)[0]


def ordered_spectrum(w_FD: jax.Array, factors: Factors) -> jax.Array:
    """The spectrum whose bins 0..L/2 are `w_FD`, in the layout of `filter_real`."""
    num_points = math.prod(factors)
    mirrored_FD = w_FD[1 : num_points - w_FD.shape[0] + 1][::-1].conj()
    w_DL = jnp.concatenate([w_FD, mirrored_FD]).T
    p, *rest = factors
    w_DPQ = jnp.moveaxis(w_DL.reshape(-1, num_points // p, p)[..., : p // 2 + 1], 1, 2)
    if len(rest) == 2:  # bin d = s + q r of the inner DFT is stored at [s, r]
        q, r = rest
        w_DPQ = jnp.swapaxes(w_DPQ.reshape(*w_DPQ.shape[:2], r, q), 2, 3).reshape(w_DPQ.shape)
    return jnp.stack([w_DPQ.real, w_DPQ.imag], 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def filter_real(x_BDN: jax.Array, s_DCZQ: jax.Array, factors: Factors) -> jax.Array:
    """The first N points of the circular convolution of L = prod(factors) >= N points.

    The backward pass stores the two inputs only and recomputes the spectra.

    Args:
      x_BDN: real, float32 or bfloat16.
      s_DCZQ: float32, from `spectrum` or `ordered_spectrum`.
      factors: the factors of L, from `factors`.

    Returns:
      [B, D, N] in the dtype of x.
    """
    z_BDCZQ = _times(_dft(x_BDN, factors), s_DCZQ[None])
    return _inverse_dft(z_BDCZQ.astype(x_BDN.dtype), x_BDN.shape[2], factors).astype(x_BDN.dtype)


def _filter_forward(
    x_BDN: jax.Array, s_DCZQ: jax.Array, factors: Factors
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return filter_real(x_BDN, s_DCZQ, factors), (x_BDN, s_DCZQ)


def _filter_backward(
    factors: Factors, residuals: tuple[jax.Array, jax.Array], dy_BDN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The adjoint of a circulant matrix has the conjugate spectrum; dS = sum_b conj(G) X / L."""
    x_BDN, s_DCZQ = residuals
    g_BDCZQ = _dft(dy_BDN, factors)
    dz_BDCZQ = _times(g_BDCZQ, _conj(s_DCZQ)[None])
    dx_BDN = _inverse_dft(dz_BDCZQ.astype(x_BDN.dtype), x_BDN.shape[2], factors)
    products = _times(_conj(g_BDCZQ), _dft(x_BDN, factors))
    weights_CZQ = (_weights(factors[0]) / math.prod(factors))[:, None, None]
    ds_DCZQ = _conj(jnp.sum(products, 0)) * weights_CZQ[None]
    return dx_BDN.astype(x_BDN.dtype), ds_DCZQ


filter_real.defvjp(_filter_forward, _filter_backward)


def _dft(x_BDN: jax.Array, factors: Factors) -> jax.Array:
    """The bins of a real signal with c <= P / 2, in unsorted order: float32 [B, D, C, Z, Q]."""
    num_points = math.prod(factors)
    p, q = factors[0], num_points // factors[0]
    B, D, N = x_BDN.shape
    rows = math.ceil(N / q)
    x_BDPQ = jnp.pad(x_BDN, ((0, 0), (0, 0), (0, rows * q - N))).reshape(B, D, rows, q)
    matrix_PZC = np.stack([part[:rows, : p // 2 + 1] for part in _matrix(p)], 1)
    z_BDCZQ = _product("bdpq,pzc->bdczq", x_BDPQ, matrix_PZC)
    z_BDCZQ = _twiddle(z_BDCZQ, (p // 2 + 1, q), num_points, parts=-2)
    return _complex_dft(z_BDCZQ.astype(x_BDN.dtype), factors[1:])


def _inverse_dft(z_BDCZQ: jax.Array, length: int, factors: Factors) -> jax.Array:
    """The first `length` points of the real signal with these bins, float32 [B, D, N]."""
    num_points = math.prod(factors)
    p, q = factors[0], num_points // factors[0]
    dtype, rows = z_BDCZQ.dtype, math.ceil(length / q)
    z_BDCZQ = _complex_dft(z_BDCZQ, factors[1:], inverse=True)
    z_BDCZQ = _twiddle(z_BDCZQ, (p // 2 + 1, q), num_points, parts=-2, inverse=True).astype(dtype)
    real, imag = (part[:rows, : p // 2 + 1] for part in _matrix(p))
    matrix_PZC = np.stack([real, imag], 1) * (_weights(p) / num_points)[None, None]
    y_BDPQ = _product("bdczq,pzc->bdpq", z_BDCZQ, matrix_PZC)
    return y_BDPQ.reshape(*y_BDPQ.shape[:2], -1)[..., :length]


def _complex_dft(z_BDCZQ: jax.Array, factors: Factors, inverse: bool = False) -> jax.Array:
    """The unnormalized DFT of the last axis by one or two products, float32."""
    if len(factors) == 1:
        (q,) = factors
        return _product("bdczq,zqyk->bdcyk", z_BDCZQ, _complex_matrix(q, inverse))
    q, r = factors
    shape, dtype = z_BDCZQ.shape, z_BDCZQ.dtype
    z = z_BDCZQ.reshape(*shape[:-1], q, r)
    inner, outer = _complex_matrix(q, inverse), _complex_matrix(r, inverse)
    if inverse:
        z = _product("bdczsr,zryv->bdcysv", z, outer)
        z = _twiddle(z, (q, r), q * r, parts=-3, inverse=True).astype(dtype)
        z = _product("bdczsv,zsyu->bdcyuv", z, inner)
    else:
        z = _product("bdczuv,zuys->bdcysv", z, inner)
        z = _twiddle(z, (q, r), q * r, parts=-3).astype(dtype)
        z = _product("bdczsv,zvyr->bdcysr", z, outer)
    return z.reshape(shape)


def _product(equation: str, x: jax.Array, matrix: np.ndarray) -> jax.Array:
    return jnp.einsum(
        equation,
        x,
        jnp.asarray(matrix, x.dtype),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _twiddle(
    z: jax.Array, shape: tuple[int, int], num_points: int, *, parts: int, inverse: bool = False
) -> jax.Array:
    """Multiplies by e^{-+ 2 pi i b c / L}; the last axes of z are (c, b) and, at `parts`, Z."""
    angles = 2 * np.pi / num_points * np.outer(*(np.arange(n) for n in shape))
    twiddle = np.stack([np.cos(angles), np.sin(angles) if inverse else -np.sin(angles)], parts)
    return _times(z, jnp.asarray(twiddle, jnp.float32)[(None,) * (z.ndim - 3)], parts)


def _times(x: jax.Array, y: jax.Array, parts: int = -2) -> jax.Array:
    """The complex product of arrays whose axis `parts` holds real and imaginary parts."""
    (a, b), (c, d) = (jnp.split(v, 2, parts) for v in (x, y))
    return jnp.concatenate([a * c - b * d, a * d + b * c], parts)


def _conj(x: jax.Array) -> jax.Array:
    return x * jnp.asarray([1.0, -1.0], x.dtype).reshape((1,) * (x.ndim - 2) + (2, 1))


def _matrix(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of the DFT matrix e^{-2 pi i j k / size}."""
    angles = 2 * np.pi / size * (np.outer(np.arange(size), np.arange(size)) % size)
    return np.cos(angles), -np.sin(angles)


def _complex_matrix(size: int, inverse: bool) -> np.ndarray:
    """The DFT matrix acting on (real, imaginary) parts, [Z, j, Z, k]."""
    real, imag = _matrix(size)
    if inverse:
        imag = -imag
    return np.stack([np.stack([real, imag], 1), np.stack([-imag, real], 1)])


def _weights(p: int) -> np.ndarray:
    """The number of bins that each c <= P / 2 stands for: c and its mirror image P - c."""
    c = np.arange(p // 2 + 1)
    return np.where((c == 0) | (2 * c == p), 1.0, 2.0).astype(np.float32)


def _pairs(n: int) -> list[tuple[int, int]]:
    return [(p, n // p) for p in range(2, n) if n % p == 0]
