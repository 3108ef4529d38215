"""The formulas of docs/math.md in float64 against direct sums, dense matrices and finite
differences. That document names the tests of the code that computes them."""

import functools
import itertools
import pathlib

import numpy as np
import pytest

from spectral_pod.ops import reference

ROOT = pathlib.Path(__file__).parents[2]
TEXT = " ".join((ROOT / "docs/math.md").read_text().split())
EXACT = 1e-11  # of numbers of order 1


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def close(actual, expected, tolerance=EXACT):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def slope(function, x, direction, step=1e-6):
    """The derivative along a direction, by central differences."""
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def matrix_of(linear, size):
    """The matrix of a linear map of vectors."""
    return np.stack([linear(e) for e in np.eye(size)], 1)


def dft(n):
    return np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n)


def toeplitz(h, n):
    """The matrix of the causal convolution of n positions with the taps h."""
    lags = np.subtract.outer(np.arange(n), np.arange(n))
    return np.where((lags >= 0) & (lags < len(h)), h[np.clip(lags, 0, len(h) - 1)], 0.0)


# ---- 1. What does nothing


def test_the_norm_gate_moves_no_vector_by_more_than_a_constant():
    for size, scale in itertools.product((1, 8, 256, 1024), (0.01, 0.3, 1, 5)):
        u, direction = scale * drawn(2, size)
        r = np.linalg.norm(u)
        gated = lambda u: u / (1 + np.exp(-np.linalg.norm(u)))  # noqa: E731
        assert np.linalg.norm(gated(u) - u) <= min(0.2785, r * np.exp(-r) + EXACT)
        assert 2 * np.linalg.norm(gated(u)) >= r
        change = slope(gated, u, direction) - direction
        assert np.linalg.norm(change) <= (1 + r) * np.exp(-r) * np.linalg.norm(direction) + 1e-8
    slopes, bias, rms = drawn(5), drawn(5, seed=1), np.abs(drawn(5, seed=2))
    logits = slopes * np.log(rms) + bias
    close(1 / (1 + np.exp(-logits)), rms**slopes / (rms**slopes + np.exp(-bias)))


def test_only_a_constant_response_mixes_no_positions():
    n = 16

    def matrix(response):
        return matrix_of(lambda x: np.fft.irfft(response * np.fft.rfft(x), n), n)

    close(matrix(np.full(n // 2 + 1, 0.7)), 0.7 * np.eye(n))
    response = drawn(n // 2 + 1)
    close(np.diag(matrix(response)), np.fft.irfft(response, n)[0])
    assert np.abs(matrix(response) - np.diag(np.diag(matrix(response)))).max() > 0.1
    bases, c = drawn(4, n // 2 + 1), drawn(4, seed=1)
    close(matrix(c @ bases), np.einsum("r,rnm->nm", c, [matrix(u) for u in bases]))


# ---- 2. Real filters


@pytest.mark.parametrize("n", [8, 9])
def test_half_of_a_complex_filter_does_nothing(n):
    x = drawn(n)

    def output(parameters):
        return np.fft.ifft((parameters[:n] + 1j * parameters[n:]) * np.fft.fft(x)).real

    assert np.linalg.matrix_rank(matrix_of(output, 2 * n)) == n
    w = drawn(n) + 1j * drawn(n, seed=1)
    odd = (w - np.roll(w[::-1], 1).conj()) / 2  # the anti-Hermitian part
    close(output(np.concatenate([odd.real, odd.imag])), 0)


def test_how_many_points_a_linear_convolution_needs():
    """N + T - 1, and not one less."""
    N, T = 12, 7
    h = drawn(T)

    def matrix(n):
        return matrix_of(lambda x: np.fft.irfft(np.fft.rfft(x, n) * np.fft.rfft(h, n), n)[:N], N)

    close(matrix(N + T - 1), toeplitz(h, N))
    assert np.abs(np.triu(matrix(N + T - 2), 1)).max() == pytest.approx(abs(h[-1]))


@pytest.mark.parametrize("n", [16, 17])
def test_gradients_of_a_filter_are_products_of_spectra(n):
    N, F = 8, n // 2 + 1
    x, dy = drawn(2, N)
    w, line = drawn(2, F) + 1j * drawn(2, F, seed=1)

    def loss(w, x):
        return np.fft.irfft(w * np.fft.rfft(x, n), n)[:N] @ dy

    G, X = np.fft.rfft(dy, n), np.fft.rfft(x, n)
    weight = np.where((np.arange(F) == 0) | (2 * np.arange(F) == n), 1, 2)
    dW = weight / n * X.conj() * G
    used = dW.copy()
    used[weight == 1] = used[weight == 1].real  # no real output has the imaginary parts
    along = used.real @ line.real + used.imag @ line.imag
    close(along, slope(lambda w: loss(w, x), w, line), 1e-8)
    dx = np.fft.irfft(w.conj() * G, n)[:N]
    close([slope(lambda x: loss(w, x), x, e) for e in np.eye(N)], dx, 1e-8)


# ---- 3. Decay


def envelope(alpha, T):
    envelope_T = np.exp(-alpha * np.arange(T))
    return envelope_T / np.linalg.norm(envelope_T)


def test_the_gradient_of_a_decay_goes_through_the_norm_of_its_envelope():
    T, t_T, f_T = 50, np.arange(50), drawn(50)
    for log_alpha in (-4.0, -1.0, 0.5):
        alpha = np.exp(log_alpha)
        h_T = f_T * envelope(alpha, T)
        mean_lag = envelope(alpha, T) ** 2 @ t_T
        differences = slope(lambda a: f_T * envelope(np.exp(a), T), log_alpha, 1.0)
        close(alpha * (mean_lag - t_T) * h_T, differences, 1e-8)
        stopped = -alpha * t_T * h_T  # if the norm were a constant to the gradient
        assert np.abs(stopped - differences).max() > 0.05 * np.abs(differences).max()
        # Unit energy whatever the decay: of white taps, only the true gradient expects no change.
        close((mean_lag - t_T) @ envelope(alpha, T) ** 2, 0)


def test_the_energy_of_older_lags_decays_twice_as_fast():
    T, alpha, lag = 2048, 0.01, 460
    energy = np.sum(envelope(alpha, T)[lag:] ** 2)
    close(
        energy, (np.exp(-2 * alpha * lag) - np.exp(-2 * alpha * T)) / (1 - np.exp(-2 * alpha * T))
    )
    assert energy == pytest.approx(1.0e-4, rel=0.02)


# ---- 4. The delta rule


def delta(q, k, v, beta, state=None, clip=None, gates=None):
    """The recurrence of one head: o [N, V] and the last state [V, K]."""
    tokens = (x[None, :, None] for x in (q, k, v, beta))
    gates = None if gates is None else np.log(gates)[None, :, None]
    state = None if state is None else state[None, None]
    o, last = reference.delta_rule(*tokens, state, None, clip, gates)
    return o[0, :, 0], last[0, 0]


def tokens_of(T, K, V, seed=0):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, T, K))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    return q, k, rng.normal(size=(T, V)), rng.uniform(size=T), rng.uniform(0.5, 1, T)


def test_a_write_at_rate_one_is_the_smallest_that_overwrites():
    K, V = 6, 4
    S, (_, (k, other), (v, _), _, _) = drawn(V, K), tokens_of(2, K, V)
    orthogonal = other - (other @ k) * k
    for beta in (0.3, 1.0, 1.7):
        _, new = delta(k[None], k[None], v[None], np.array([beta]), S)
        close(new @ k, (1 - beta) * (S @ k) + beta * v)
        close(new @ orthogonal, S @ orthogonal)
        close(new, S - beta * matrix_of(lambda x: (S @ k - v) * (x @ k), K))
    _, new = delta(k[None], k[None], v[None], np.ones(1), S)
    least = np.linalg.lstsq(np.kron(np.eye(V), k), v - S @ k)[0].reshape(V, K)  # least norm
    close(new, S + least)
    seven = np.repeat(k[None], 7, 0), np.repeat(k[None], 7, 0), np.zeros((7, V)), np.full(7, 0.3)
    close(delta(*seven, S)[1] @ k, 0.7**7 * (S @ k))  # of the original rate, 8% are left


def test_eigenvalues_of_a_write_bound_what_is_kept_but_not_the_errors():
    k = drawn(8)
    for rate in (0.1, 1.0, 2.0, 19.2):  # beta |k|^2
        A = np.eye(8) - rate * np.outer(k, k) / (k @ k)
        close(np.linalg.eigvalsh(A), np.sort([1 - rate, *np.ones(7)]))
        assert (np.linalg.norm(A, 2) <= 1 + EXACT) == (rate <= 2)
    # Nearly equal unit keys with opposite values, in turn: the memory grows to 1 / sin(half angle).
    half = 0.05
    pair = np.array([[np.cos(half), np.sin(half)], [np.cos(half), -np.sin(half)]])
    k, v = np.tile(pair, (2000, 1)), np.tile([[1.0], [-1.0]], (2000, 1))
    _, state = delta(k, k, v, np.ones(4000))
    close(state @ [0, 1], [1 / np.sin(half)], 1e-4)


def products_of_gates(gates):
    """G(s, t) in row t and column s, both from 0: before the first token."""
    T = len(gates)
    return np.array([[np.prod(gates[s:t]) for s in range(T + 1)] for t in range(T + 1)])


def chunk_matrices(q, k, gates):
    G = products_of_gates(gates)
    a, z, inner = G[1:, 0], G[-1, 1:], G[1:, 1:]
    return a, z, G[-1, 0], np.tril(inner * (k @ k.T), -1), np.tril(inner * (q @ k.T))


def test_a_chunk_is_a_triangular_solve():
    T, K, V = 11, 5, 4
    (q, k, v, beta, gates), S = tokens_of(T, K, V), drawn(V, K)
    a, z, whole, L, A = chunk_matrices(q, k, gates)
    E = np.linalg.solve(np.eye(T) + L * beta, v - a[:, None] * (k @ S.T))
    U = beta[:, None] * E
    o, last = delta(q, k, v, beta, S, gates=gates)
    close(a[:, None] * (q @ S.T) + A @ U, o)
    close(whole * S + (z[:, None] * U).T @ k, last)
    close(
        U,
        np.linalg.solve(
            np.eye(T) + beta[:, None] * L, beta[:, None] * (v - a[:, None] * (k @ S.T))
        ),
    )
    transitions = [np.eye(K) - b * np.outer(key, key) for b, key in zip(beta, k)]
    W = np.linalg.solve(np.eye(T) + np.tril(k @ k.T, -1) * beta, k)
    close(np.eye(K) - (beta[:, None] * W).T @ k, functools.reduce(np.matmul, transitions))


def test_a_chunk_maps_its_state_affinely():
    T, K, V = 9, 5, 4
    (q, k, v, beta, gates), S = tokens_of(T, K, V, seed=1), drawn(V, K)
    a, z, whole, L, _ = chunk_matrices(q, k, gates)
    x = np.linalg.solve(np.eye(T) + L * beta, np.concatenate([v, a[:, None] * k], 1))
    y = ((z * beta)[:, None] * x).T @ k
    M, B = whole * np.eye(K) - y[V:], y[:V]
    close(S @ M + B, delta(q, k, v, beta, S, gates=gates)[1])
    padded = np.concatenate([v, np.zeros((T, K))], 1), beta, np.concatenate([0 * S, np.eye(K)])
    close(delta(q, k, *padded, gates=gates)[1], np.concatenate([B, M]))


# ---- 5. The clip


def test_a_clipped_write_is_short_and_its_gradient_is_a_projection():
    beta, clip, K, V = 0.7, 2.0, 6, 4
    e, k = 3 * drawn(V), drawn(K, seed=1)

    def write(e):
        return beta * min(1, clip / (np.linalg.norm(e) * np.linalg.norm(k))) * e

    assert np.linalg.norm(np.outer(write(e), k)) == pytest.approx(beta * clip)
    n, rho = e / np.linalg.norm(e), np.linalg.norm(write(e)) / np.linalg.norm(e)
    jacobian = np.stack([slope(write, e, along) for along in np.eye(V)], 1)
    close(jacobian, rho * (np.eye(V) - np.outer(n, n)), 1e-8)
    q, k, v, rate, _ = tokens_of(60, K, V)
    states = [delta(q[:n], 9 * k[:n], v[:n], rate[:n], clip=clip)[1] for n in range(61)]
    steps = np.linalg.norm(np.diff(states, axis=0), axis=(1, 2))
    assert (steps <= rate * clip + EXACT).all()
    assert np.linalg.norm(delta(q, 9 * k, v, rate)[1]) > 1e20  # without the clip


def test_every_round_settles_one_more_clip():
    T, K, V, clip, first = 24, 3, 4, 1.5, 6  # the first token that is clipped
    q, k, v, beta, _ = tokens_of(T, K, V)
    v[:first] *= 0.1
    L = np.tril(k @ k.T, -1)

    def errors(c):
        return np.linalg.solve(np.eye(T) + L * (beta * c), v)

    def factors(e):
        return np.minimum(1, clip / np.linalg.norm(e, axis=1))

    exact = np.ones(T)
    for t in range(T):  # the recurrence: a factor at a time
        exact[t] = factors(errors(exact))[t]
    state = (beta * exact * errors(exact).T) @ k
    close(state, delta(q, k, v, beta, clip=clip)[1])
    assert (exact < 1).argmax() == first
    for start, settled in ((np.ones(T), first), (drawn(T) ** 2, 0)):
        c, rounds = start, 0
        while settled + rounds < T:
            c, rounds = factors(errors(c)), rounds + 1
            close(c[: settled + rounds], exact[: settled + rounds])
        close(factors(errors(c)), c)


# ---- 6. No leaks


def test_blocks_of_a_convolution_add_up_and_see_the_past_only():
    N, M, h = 40, 8, drawn(8, seed=1)
    x_GM = drawn(N).reshape(-1, M)
    expected = toeplitz(h, N) @ x_GM.ravel()
    added = np.zeros(N + M)
    for g, x_M in enumerate(x_GM):
        added[g * M : (g + 2) * M - 1] += np.convolve(h, x_M)
    close(added[:N], expected)
    before_GM = np.concatenate([np.zeros((1, M)), x_GM[:-1]])
    pairs = np.concatenate([before_GM, x_GM], 1)
    circular = np.fft.irfft(np.fft.rfft(pairs, axis=1) * np.fft.rfft(h, 2 * M), axis=1)
    close(circular[:, M:].ravel(), expected)
    assert np.abs(circular[:, :M].ravel() - expected).max() > 0.1  # these wrap around


# ---- 7. Factorisations


@pytest.mark.parametrize(("N", "T"), [(24, 6), (30, 5)])
def test_block_toeplitz_products(N, T):
    G = N // T
    u, h, dy = drawn(3, N)

    def tap(lag):
        return np.where(lag >= 0, h[np.clip(lag, 0, N - 1)], 0.0)

    lags = np.subtract.outer(np.arange(T), np.arange(T)).T  # t - s in row s and column t
    M = [tap(j * T + lags) for j in range(G)]
    U, dY = u.reshape(G, T), dy.reshape(G, T)
    pairs = [(i, j) for i in range(G) for j in range(i + 1)]
    assert len(pairs) * T**2 == N * (N + T) / 2
    Y, dU, dh = np.zeros((G, T)), np.zeros((G, T)), np.zeros(N + T)
    for i, j in pairs:
        Y[i] += U[i - j] @ M[j]
        dU[i - j] += dY[i] @ M[j].T
        np.add.at(dh, j * T + lags, np.outer(U[i - j], dY[i]))  # negative lags are at the end
    close(Y.ravel(), toeplitz(h, N) @ u)
    close(dU.ravel(), toeplitz(h, N).T @ dy)
    close(dh[:N], [u[: N - t] @ dy[t:] for t in range(N)])


def test_butterflies_and_small_dfts():
    n, T = 48, 8
    Q, x, dy = n // T, drawn(48), drawn(48, seed=1)
    z_QT = np.exp(-2j * np.pi * np.outer(np.arange(Q), np.arange(Q)) / Q) @ x.reshape(Q, T)
    close(z_QT[1:], z_QT[:0:-1].conj())
    k = np.arange(n)
    close((np.exp(-2j * np.pi * np.outer(k, np.arange(T)) / n) * z_QT[k % Q]).sum(1), dft(n) @ x)
    rows = dft(n)[: n // 2 + 1] * np.where(k[: n // 2 + 1] % (n // 2) == 0, 1, np.sqrt(2))[:, None]
    R = np.concatenate([rows.real, rows.imag[1:-1]]) / np.sqrt(n)
    close(R @ R.T, np.eye(n))
    w = drawn(n // 2 + 1) + 1j * drawn(n // 2 + 1, seed=2)
    w.imag[[0, -1]] = 0

    def times(w, bins):
        z = w * (bins[: n // 2 + 1] + 1j * np.pad(bins[n // 2 + 1 :], 1))
        return np.concatenate([z.real, z.imag[1:-1]])

    filtered = matrix_of(lambda x: np.fft.irfft(w * np.fft.rfft(x), n), n)
    close(R.T @ times(w, R @ x), filtered @ x)
    close(R.T @ times(w.conj(), R @ dy), filtered.T @ dy)


def test_two_factors_of_a_dft():
    P, Q = 6, 5
    x = drawn(P * Q).reshape(P, Q)  # row a, column b
    twiddle = np.exp(-2j * np.pi * np.outer(np.arange(P), np.arange(Q)) / (P * Q))
    X_PQ = (twiddle * (dft(P) @ x)) @ dft(Q)  # row c, column d
    close(X_PQ.T.ravel(), np.fft.fft(x.ravel()))
    z = twiddle.conj() * (X_PQ @ dft(Q).conj())
    close(dft(P).conj() @ z / (P * Q), x)


def test_a_dft_over_devices():
    """A linear filter of a complex pair of sequences, with P devices and two exchanges each way."""
    P, M = 4, 16
    n, z, h = 2 * P * M, drawn(P * M) + 1j * drawn(P * M, seed=1), drawn(P * M, seed=2)
    c_r = np.outer(np.arange(2 * P), np.arange(M))
    of_devices = np.exp(-2j * np.pi * np.outer(np.arange(2 * P), np.arange(P)) / (2 * P))
    outer = np.exp(-2j * np.pi * c_r / n) * (of_devices @ z.reshape(P, M))  # [c, r]
    X_CD = outer @ dft(M)
    close(X_CD.T.ravel(), np.fft.fft(z, n))
    filtered = X_CD * np.fft.fft(h, n).reshape(M, 2 * P).T
    inner = np.exp(2j * np.pi * c_r / n) * (filtered @ dft(M).conj() / M)
    y = (of_devices.conj().T @ inner / (2 * P)).ravel()
    close(y.real, toeplitz(h, P * M) @ z.real)
    close(y.imag, toeplitz(h, P * M) @ z.imag)


def test_right_angle_convolution():
    M = 12
    x, h, a, dy, later = drawn(5, M)
    a[0] = 0

    def product(x, taps, order):
        """Multiplication modulo X^M = e^{i pi / order}."""
        w = np.exp(1j * np.pi / order * np.arange(M) / M)
        return w.conj() * np.fft.ifft(np.fft.fft(w * x) * np.fft.fft(w * taps))

    whole = np.append(np.convolve(h, x), 0)
    close(product(x, h, 2), whole[:M] + 1j * whole[M:])
    close(product(x, h, 1), whole[:M] - whole[M:])  # negacyclic: odd frequencies
    lags = np.subtract.outer(np.arange(M), np.arange(M))
    two_sided = np.where(lags >= 0, h[lags % M], a[lags % M])
    close(product(x, h - 1j * a, 2).real, two_sided @ x)
    # The adjoint of x -> (Re z, Im z), where Im z is added to the next block.
    w = np.exp(0.5j * np.pi * np.arange(M) / M)
    S, G = np.fft.fft(w * h), np.fft.fft(w * (dy + 1j * later))
    dx = (w.conj() * np.fft.ifft(S.conj() * G)).real
    close(dx @ x, dy @ whole[:M] + later @ whole[M:])
    line = drawn(M, seed=1)
    dS = np.fft.fft(w * x).conj() * G / M  # d/dRe + i d/dIm
    along = np.append(np.convolve(line, x), 0)
    close((dS.conj() @ np.fft.fft(w * line)).real, dy @ along[:M] + later @ along[M:])


# ---- 8. Online convolution


def test_every_pair_is_in_one_tile_and_no_tile_wraps_around():
    N = 64
    counts = np.eye(N)  # the input's own position is added in its step
    x, h, y = drawn(N), drawn(2 * N, seed=1), np.zeros(2 * N)
    for i in range(1, N):
        U = i & -i
        counts[i : i + U, i - U : i] += 1
        circular = np.fft.irfft(np.fft.rfft(x[i - U : i], 2 * U) * np.fft.rfft(h[: 2 * U]), 2 * U)
        y[i : i + U] += circular[U:]
    np.testing.assert_array_equal(counts, np.tril(np.ones((N, N))))
    close(y[:N] + h[0] * x, toeplitz(h, N) @ x)


def test_every_pair_of_a_product_is_counted_once_and_in_time():
    N = 64
    counts = np.zeros((2 * N, 2 * N), int)  # of q_a k_b
    for n in range(N):
        counts[n, 0] += 1  # the step of position n: pairs with the first entry of the other side
        counts[0, n] += n > 0
        due = [counts[a, n - a] for a in range(n + 1)]
        assert due == [1] * (n + 1)
        i = n + 1
        U = i & -i
        for new, old in itertools.product(range(i - U, i), range(min(i, 2 * U))):
            if i <= new + old < i + U:
                counts[new, old] += 1  # new q with any k that has arrived
                counts[old, new] += old < i - U  # new k with q, but not with new q again
    assert counts.max() == 1


# ---- 9. Complexity


def test_the_example_of_the_original_design():
    """Its formulas at its own sizes, as docs/math.md states them."""
    layers, N, D, memory = 6, 512, 256, 64
    filters, memories = layers * N * int(np.log2(N)) * D, layers // 2 * N * memory**2
    for count in (filters, memories, filters + memories, layers * N * D**2, 2 * layers * N**2 * D):
        assert f"{count / 1e6:.1f} million" in TEXT
    assert f"{N * D + layers * memory**2:,} numbers" in TEXT
    growth = {n: n * np.log2(n) / (N * np.log2(N)) for n in (1024, 2048, 4096)}
    assert ", ".join(f"{x:.1f}" for x in growth.values()) in TEXT


@pytest.mark.parametrize("N", [8, 64, 256])
def test_a_transform_with_bounded_coefficients_takes_n_log_n_steps(N):
    """Morgenstern's potential is that of the DFT, and the radix-2 algorithm is within twice it."""
    log_volume = np.linalg.slogdet(dft(N))[1] / np.log(2)
    close(log_volume, N / 2 * np.log2(N), 1e-8)
    gates = 0

    def fft(x):
        nonlocal gates
        if len(x) == 1:
            return x
        even, odd = fft(x[::2]), fft(x[1::2])
        gates += len(x)  # u + w v and u - w v, with |w| = 1
        odd = np.exp(-2j * np.pi * np.arange(len(odd)) / len(x)) * odd
        return np.concatenate([even + odd, even - odd])

    close(fft(drawn(N) + 0j), dft(N) @ drawn(N), 1e-9)
    assert log_volume <= gates + 1e-8 <= 2 * log_volume + 1e-7


def test_a_memory_recalls_as_many_values_as_it_has_columns():
    K, V = 5, 3
    keys = np.linalg.qr(drawn(K, K))[0]
    values = drawn(K, V, seed=1)
    _, state = delta(keys, keys, values, np.ones(K))
    close(keys @ state.T, values)
    keys, values = drawn(K + 1, K), drawn(K + 1, V, seed=1)
    best = keys @ np.linalg.lstsq(keys, values)[0]  # of all matrices
    assert np.abs(best - values).max() > 0.01
