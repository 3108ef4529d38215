"""The algebra of chunks of tokens, which all matrix forms of the delta rule share.

Let q, k, v hold the tokens of a chunk as rows and beta be a column. Let g_t be the gate of token t,
and G(s, t) the product of the gates of the tokens after s up to t, with s = 0 before the chunk. Let
S be the state before the chunk, e_t the prediction error of token t, and rho_t the rate of its
write: beta_t times the factor by which its clip shortens it. Given the rates, the errors are

    e_t = v_t - G(0, t) S k_t - sum_{s < t} G(s, t) (k_t . k_s) rho_s e_s,    that is
    e = (I + L diag(rho))^-1 (v - a k S^T),    L = tril(G * k k^T, -1),    u = rho e,
    o = a q S^T + A u,    A = tril(G * q k^T),    S <- G(0, T) S + (z u)^T k,

with the columns a = G(0, t) and z = G(t, T): the chunked form of Yang et al. 2024, "Parallelizing
Linear Transformers with the Delta Rule over Sequence Length", with the gates of Yang et al. 2024,
"Gated Delta Networks", solved for errors instead of writes. Without gates every G is 1. Logs of G
are sums of log gates and never differences of sums, so G is at most 1 and exact to rounding.

Arrays have the axes [B, G, H, T, ...] here, T tokens of chunk G; the first three may come in any
other order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.ops.delta_recurrence import DeltaInputs, dot


class Decays(NamedTuple):
    """Products of gates, or, from `log_gate_products`, sums of their logs."""

    between: jax.Array  # [B, G, H, T, T], G(s, t) in row t and column s < t
    since: jax.Array  # [B, G, H, T, 1], a
    until: jax.Array  # [B, G, H, T, 1], z
    whole: jax.Array  # [B, G, H, 1, 1], G(0, T)


class Solved(NamedTuple):
    """Chunks whose errors are known."""

    decays: Decays
    lower: jax.Array  # L
    inverse: jax.Array  # (I + L diag(rho))^-1
    states: jax.Array  # [B, G, H, V, K], before each chunk
    e: jax.Array


class Reads(NamedTuple):
    """The cotangents of the outputs, and what follows from them alone."""

    do: jax.Array
    attention: jax.Array  # A
    do_state: jax.Array  # a do, the cotangent of q S^T
    du: jax.Array  # A^T do, of u
    dstate: jax.Array  # (a do)^T q, of S


def gate_products(inputs: DeltaInputs) -> Decays:
    """The decays of chunks, ones without gates."""
    if inputs.log_gate is None:
        return Decays(*4 * [jnp.ones((1, inputs.k.shape[1], 1, 1, 1), inputs.k.dtype)])
    return jax.tree.map(jnp.exp, log_gate_products(inputs.log_gate))


def log_gate_products(log_gate_BGHT: jax.Array) -> Decays:
    """Their logs, each a sum of log gates."""
    T = log_gate_BGHT.shape[-1]
    rows = jnp.broadcast_to(log_gate_BGHT[..., None], (*log_gate_BGHT.shape, T))
    between = jnp.cumsum(jnp.tril(rows, -1), -2)
    since = jnp.cumsum(log_gate_BGHT, -1)[..., None]
    return Decays(between, since, between[..., -1, :, None], since[..., -1:, :])


def key_products(inputs: DeltaInputs, decays: Decays) -> jax.Array:
    """L, the products of keys with earlier keys."""
    return jnp.tril(dot(inputs.k, inputs.k.mT) * decays.between, -1)


def query_products(inputs: DeltaInputs, decays: Decays) -> jax.Array:
    """A, the products of queries with keys."""
    return jnp.tril(dot(inputs.q, inputs.k.mT) * decays.between)


def outputs(
    inputs: DeltaInputs, decays: Decays, states: jax.Array, rate: jax.Array, e: jax.Array
) -> jax.Array:
    """o, from the states before the chunks, the rates [B, G, H, T, 1] and the errors."""
    within = query_products(inputs, decays)
    return decays.since * dot(inputs.q, states.mT) + dot(within, rate * e)


def read_cotangents(inputs: DeltaInputs, decays: Decays, do: jax.Array) -> Reads:
    """What follows from the cotangents of the outputs alone."""
    within, do_state = query_products(inputs, decays), decays.since * do
    return Reads(do, within, do_state, dot(within.mT, do), dot(do_state.mT, inputs.q))


def input_cotangents(
    inputs: DeltaInputs,
    solved: Solved,
    reads: Reads,
    u: jax.Array,
    du: jax.Array,
    dr: jax.Array,
    dstates: jax.Array,
) -> DeltaInputs:
    """The cotangents of the inputs, given all those that depend on the order of chunks.

    With r = v - a k S^T, so that e = r - L u, we have dL = -tril(dr u^T, -1), and the cotangent of
    the rate is e . (du - L^T dr); the product rule gives the others.

    Args:
      inputs, solved: the forward pass.
      reads: of the outputs.
      u, du: the writes, and their cotangents through the outputs and the states after the chunks.
      dr: the cotangents of r.
      dstates: the cotangents of the states after the chunks.

    Returns:
      The cotangents of the inputs, with that of the rate in place of beta's.
    """
    q, k, _, _, log_gate = inputs
    decays, lower, _, states, e = solved
    do, attention, do_state, _, _ = reads
    # The contributions through the state S, through A and through L.
    dq_state, dk_state = dot(do_state, states), -dot(decays.since * dr, states)
    dk_write = dot(decays.until * u, dstates)
    dattention, dlower = jnp.tril(dot(do, u.mT)), -jnp.tril(dot(dr, u.mT), -1)
    dqk, dkk = dattention * decays.between, dlower * decays.between
    dq = dq_state + dot(dqk, k)
    dk = dk_state + dk_write + dot(dqk.mT, q) + dot(dkk + dkk.mT, k)
    drate = jnp.sum((du - dot(lower.mT, dr)) * e, -1)
    dlog_gate = None
    if log_gate is not None:
        dlogs = Decays(
            between=dattention * attention + dlower * lower,
            since=jnp.sum(dq_state * q + dk_state * k, -1, keepdims=True),
            until=jnp.sum(dk_write * k, -1, keepdims=True),
            whole=decays.whole * jnp.sum(dstates * states, (-2, -1), keepdims=True),
        )
        (dlog_gate,) = jax.vjp(log_gate_products, log_gate)[1](dlogs)
    return DeltaInputs(dq, dk, dr, drate, dlog_gate)


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """(I + lower)^-1 for strictly lower triangular matrices [..., T, T], T = 8 * 2^j.

    Recursive halving by [[P, 0], [C, Q]]^-1 = [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]], down to blocks of
    4, whose inverse is (I - L)(I + L^2), exact as L^4 = 0. With repeated keys, the powers of L that
    larger blocks need grow like binomial coefficients and cancel: blocks of 8 would lose a digit,
    whole chunks all of them.

    Raises:
      ValueError: T is not 8 * 2^j.
    """
    size = lower.shape[-1]
    if size == 8:  # both blocks of 4 in one matrix, as CPUs are slow at 4 x 4 products
        eye = jnp.broadcast_to(jnp.eye(8, dtype=lower.dtype), lower.shape)
        blocks = lower.at[..., 4:, :4].set(0.0)
        inverse = dot(eye - blocks, eye + dot(blocks, blocks))
        return inverse - dot(inverse, dot(lower - blocks, inverse))
    if size % 16:
        raise ValueError(f"a chunk must have 8 * 2^j tokens; halving it led to {size}")
    half = size // 2
    halves = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = unit_lower_inverse(halves)
    corner = -dot(second, dot(lower[..., half:, :half], first))
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)


def split(x_BNH: jax.Array, chunk: int) -> jax.Array:
    """[B, N, H, ...] -> [B, G, H, T, ...]."""
    B, _, *rest = x_BNH.shape
    return jnp.swapaxes(x_BNH.reshape(B, -1, chunk, *rest), 2, 3)


def join(x_BGHT: jax.Array) -> jax.Array:
    """[B, G, H, T, ...] -> [B, N, H, ...], the inverse of `split`."""
    x_BGTH = jnp.swapaxes(x_BGHT, 2, 3)
    B, G, T, *rest = x_BGTH.shape
    return x_BGTH.reshape(B, G * T, *rest)
