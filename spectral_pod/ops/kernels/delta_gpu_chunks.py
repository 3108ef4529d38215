"""The delta rule by chunks of tokens, on the matrix units of GPUs: kernels with exact clips.

The algebra is that of `delta_batched.py`, whose letters these kernels have. Three kernels compute
the results:

    inverse   P = (I + L diag(beta))^-1 of every chunk,
    states    e = P (v - a k S^T) and S <- G(0, T) S + (z u)^T k, from chunk to chunk,
    outputs   o = a q S^T + A u of every chunk,

and three the gradients, of which only the second is in the order of chunks, the last one first:

    reads     A^T do, (a do)^T q, and the cotangents of q and k through o, of every chunk,
    errors    du = A^T do + z k dS^T, dr = P^T (beta du) and
              dS <- G(0, T) dS + (a do)^T q - (a dr)^T k, from chunk to chunk,
    writes    the cotangents of k, beta and the gates through e and S, of every chunk.

P holds as long as no write of a chunk is clipped. The kernels that go from chunk to chunk see
whether one was, and then walk through its tokens by the definition, `delta_recurrence.py`.

A float32 factor is a sum of two bfloat16 terms, in three products, and of three terms where errors
would add up from chunk to chunk or cancel; errors are some 1e-5. The kernels are written in Pallas
for its Triton back end. Letters here: G chunks, T tokens of a chunk. The others are in `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spectral_pod.ops.delta_recurrence import DeltaInputs, DeltaResult
from spectral_pod.ops.kernels.body import terms
from spectral_pod.ops.kernels.delta_gpu import unserved
from spectral_pod.ops.kernels.delta_gpu_calls import call, named, padded

_CHUNK = 64  # tokens of one triangular solve
_LEAST_LOG = -1e4  # of a gate, whose exponential is zero


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one call, after padding."""

    tokens: int  # a multiple of _CHUNK
    clip: float | None
    gated: bool
    warps: int
    interpret: bool

    @property
    def chunks(self) -> int:
        return self.tokens // _CHUNK


def delta_rule(
    inputs: DeltaInputs, state_BHVK: jax.Array, clip: float | None, *, interpret: bool = False
) -> DeltaResult:
    """The same function as `delta_rule_recurrent`, in float32.

    Args:
      inputs, state_BHVK, clip: as in `delta_rule_recurrent`, float32; any sizes up to K, V = 128,
        which are padded to powers of two.
      interpret: runs the kernels as ordinary JAX operations, on any platform.

    Raises:
      ValueError: `unserved` gives a reason.
    """
    N, K, V = inputs.k.shape[1], inputs.k.shape[3], inputs.v.shape[3]
    if not interpret and (reason := unserved(K, V)):
        raise ValueError(f"the delta rule cannot use method 'fused_chunks': {reason}")
    inputs, state_BHVK = padded(inputs, state_BHVK, _CHUNK)
    warps = 4 if max(state_BHVK.shape[2:]) <= 64 else 8
    plan = _Plan(inputs.k.shape[1], clip, inputs.log_gate is not None, warps, interpret)
    o_BNHV, state_BHVK, clipped_BH = _delta(inputs, state_BHVK, plan)
    return DeltaResult(o_BNHV[:, :N, :, :V], state_BHVK[:, :, :V, :K], clipped_BH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _delta(inputs: DeltaInputs, state_BHVK: jax.Array, plan: _Plan) -> DeltaResult:
    return _delta_forward(inputs, state_BHVK, plan)[0]


def _delta_forward(
    inputs: DeltaInputs, state_BHVK: jax.Array, plan: _Plan
) -> tuple[DeltaResult, dict[str, jax.Array]]:
    B, H, V, K = state_BHVK.shape
    T, G = _CHUNK, plan.chunks
    x = named(inputs)
    made: dict[str, tuple[int, ...]] = {"inverse_BGHTT": (B, G, H, T, T)}
    if plan.gated:
        made["between_BGHTT"] = (B, G, H, T, T)
    x |= _call(_inverse, "delta_inverse", plan, x, made)
    made = {
        "e_BNHV": inputs.v.shape,
        "states_BGHVK": (B, G, H, V, K),
        "last_BHVK": state_BHVK.shape,
        "clipped_BH": (B, H),
    }
    if plan.clip is not None:
        made["factor_BNH"] = inputs.beta.shape
    x |= _call(_states, "delta_states", plan, x | {"state_BHVK": state_BHVK}, made)
    x |= _call(_outputs, "delta_outputs", plan, x, {"o_BNHV": inputs.v.shape})
    result = DeltaResult(*(x.pop(name) for name in ("o_BNHV", "last_BHVK", "clipped_BH")))
    del x["v_BNHV"]
    return result, x


def _delta_backward(
    plan: _Plan, x: dict[str, jax.Array], cotangents: DeltaResult
) -> tuple[DeltaInputs, jax.Array]:
    do_BNHV, dlast_BHVK, _ = cotangents
    x = x | {"do_BNHV": do_BNHV}
    made = {
        "du_BNHV": do_BNHV.shape,
        "dq_BNHK": x["q_BNHK"].shape,
        "dk_reads_BNHK": x["k_BNHK"].shape,
        "dstates_reads_BGHVK": x["states_BGHVK"].shape,
    }
    if plan.gated:
        made["dlog_gate_reads_BNH"] = x["log_gate_BNH"].shape
    x |= _call(_reads, "delta_reads", plan, x, made)
    made = {
        "dv_BNHV": do_BNHV.shape,
        "dstates_BGHVK": x["states_BGHVK"].shape,
        "dstate_BHVK": dlast_BHVK.shape,
    }
    x |= _call(_errors, "delta_errors", plan, x | {"dlast_BHVK": dlast_BHVK}, made)
    made = {"dk_BNHK": x["k_BNHK"].shape, "dbeta_BNH": x["beta_BNH"].shape}
    if plan.gated:
        made["dlog_gate_BNH"] = x["log_gate_BNH"].shape
    dk_BNHK, *scalars = _call(_writes, "delta_writes", plan, x, made).values()
    return DeltaInputs(x["dq_BNHK"], dk_BNHK, x["dv_BNHV"], *scalars), x["dstate_BHVK"]


_delta.defvjp(_delta_forward, _delta_backward)


# ---- what kernels share


class _Chunk:
    """The arrays of one chunk of a head, read when they are asked for."""

    def __init__(self, refs: dict[str, Any], plan: _Plan, g: Any):
        self._refs, self._plan, self.g = refs, plan, g
        self._tokens = pl.ds(g * _CHUNK, _CHUNK)

    def _at(self, name: str) -> tuple[Any, ...]:
        """Where the chunk is in the array, by the letters of its dimensions."""
        letters = name.rpartition("_")[2]
        known = {"B": 0, "H": 0, "N": self._tokens, "G": self.g}
        return tuple(known.get(letter, slice(None)) for letter in letters)

    def __getitem__(self, name: str) -> jax.Array:
        return self._refs[name][self._at(name)]

    def __setitem__(self, name: str, x: jax.Array) -> None:
        self._refs[name][self._at(name)] = x

    def rate(self) -> jax.Array:
        """beta, times the factors of clips [T, 1]."""
        rate_T = self["beta_BNH"]
        if self._plan.clip is not None:
            rate_T *= self["factor_BNH"]
        return rate_T[:, None]

    def since(self) -> jax.Array | None:
        """a [T, 1], the product of gates from the start of the chunk; None without gates."""
        if not self._plan.gated:
            return None
        row, column = _indices()
        return jnp.exp(jnp.sum(jnp.where(row >= column, self._log_gate()[None], 0.0), 1))[:, None]

    def until(self) -> jax.Array | None:
        """z [T, 1], the product of gates to the end of the chunk."""
        if not self._plan.gated:
            return None
        row, column = _indices()
        return jnp.exp(jnp.sum(jnp.where(row > column, self._log_gate()[:, None], 0.0), 0))[:, None]

    def whole(self) -> jax.Array | None:
        """G(0, T), of all gates."""
        return jnp.exp(jnp.sum(self._log_gate())) if self._plan.gated else None

    def between(self) -> jax.Array | None:
        """G [T, T], the products of gates from one token to another."""
        return self["between_BGHTT"] if self._plan.gated else None

    def products(self) -> jax.Array:
        """Computes `between`."""
        row, column = _indices()
        logs = jnp.where(row > column, self._log_gate()[:, None], 0.0)
        return jnp.exp(_dot((row >= column).astype(jnp.float32), logs))

    def _log_gate(self) -> jax.Array:
        return jnp.maximum(self["log_gate_BNH"], _LEAST_LOG)


def _times(decay: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if decay is None else decay * x


def _dot(
    x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0), parts: int = 2
) -> jax.Array:
    """x y, summed over these dimensions, by products of so many bfloat16 terms of each."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    xs, ys = terms(x, parts), terms(y, parts)
    products = [
        lax.dot_general(xs[i], ys[order - i], dimensions, preferred_element_type=jnp.float32)
        for order in reversed(range(parts))  # the smallest first
        for i in range(order + 1)
    ]
    return functools.reduce(jnp.add, products)


def _release(plan: _Plan) -> None:
    """Keeps loads that follow from being merged with earlier ones, and registers for them."""
    if not plan.interpret:
        plgpu.debug_barrier()


def _squares(x: jax.Array) -> jax.Array:
    """The squared lengths of rows."""
    return jnp.sum(x * x, 1)


def _indices() -> tuple[jax.Array, jax.Array]:
    """The rows and the columns of a [T, T] matrix."""
    row, column = (lax.broadcasted_iota(jnp.int32, (_CHUNK, _CHUNK), axis) for axis in (0, 1))
    return row, column


def _lower(chunk: _Chunk, between: jax.Array | None) -> jax.Array:
    """L, the products of keys with earlier keys."""
    row, column = _indices()
    products = _dot(chunk["k_BNHK"], chunk["k_BNHK"], (1, 1))
    return jnp.where(row > column, _times(between, products), 0.0)


def _attention(chunk: _Chunk) -> jax.Array:
    """A, the products of queries with keys."""
    row, column = _indices()
    products = _dot(chunk["q_BNHK"], chunk["k_BNHK"], (1, 1))
    return jnp.where(row >= column, _times(chunk.between(), products), 0.0)


# ---- kernels


def _inverse(refs: dict[str, Any], plan: _Plan) -> None:
    chunk = _Chunk(refs, plan, pl.program_id(2))
    between = None
    if plan.gated:
        between = chunk["between_BGHTT"] = chunk.products()
    lower = _lower(chunk, between) * chunk["beta_BNH"][None]
    chunk["inverse_BGHTT"] = _unit_lower_inverse(lower)


def _unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """`delta_algebra.unit_lower_inverse`: the inverses of all blocks of 4, then of 8, and so on."""
    row, column = _indices()
    apart = row ^ column  # below a power of two within blocks of that size
    blocks, eye = jnp.where(apart < 4, lower, 0.0), (apart == 0).astype(jnp.float32)
    inverse = _dot(eye - blocks, eye + _dot(blocks, blocks, parts=3), parts=3)
    size = 4
    while size < _CHUNK:
        corners = jnp.where((apart >= size) & (apart < 2 * size), lower, 0.0)
        inverse -= _dot(inverse, _dot(corners, inverse, parts=3), parts=3)
        size *= 2
    return inverse


def _states(refs: dict[str, Any], plan: _Plan) -> None:
    def step(g: jax.Array, carry: Any) -> Any:
        state_VK, clipped = carry
        chunk = _Chunk(refs, plan, g)
        chunk["states_BGHVK"] = state_VK
        read_TV = _times(chunk.since(), _dot(chunk["k_BNHK"], state_VK, (1, 1)))
        e_TV = _dot(chunk["inverse_BGHTT"], chunk["v_BNHV"] - read_TV, parts=3)
        _release(plan)
        u_TV = _times(chunk.until(), chunk["beta_BNH"][:, None] * e_TV)
        later_VK = _times(chunk.whole(), state_VK) + _dot(u_TV, chunk["k_BNHK"], (0, 0), parts=3)
        if plan.clip is None:
            chunk["e_BNHV"] = e_TV
            return later_VK, clipped

        def by_chunk() -> Any:
            chunk["e_BNHV"] = e_TV
            chunk["factor_BNH"] = jnp.ones((_CHUNK,), jnp.float32)
            return later_VK, clipped

        size2_T = _squares(e_TV) * _squares(chunk["k_BNHK"])
        # Not `any(>)`: with writes that should have been clipped, errors may be NaN.
        within_T = size2_T <= jnp.float32(plan.clip**2)
        exceed = jnp.sum(within_T.astype(jnp.int32)) < _CHUNK
        by_token = functools.partial(_chunk_by_tokens, refs, plan, g, state_VK, clipped)
        return lax.cond(exceed, by_token, by_chunk)

    first = refs["state_BHVK"][0, 0], jnp.float32(0)
    state_VK, clipped = lax.fori_loop(0, plan.chunks, step, first)
    refs["last_BHVK"][0, 0] = state_VK
    refs["clipped_BH"][0, 0] = clipped


def _chunk_by_tokens(
    refs: dict[str, Any], plan: _Plan, g: jax.Array, state_VK: jax.Array, clipped: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes the errors and factors of a chunk; returns the state after it, and clipped tokens."""
    clip = plan.clip
    assert clip is not None

    def token(t: jax.Array, carry: Any) -> Any:
        state_VK, clipped = carry
        k_K = refs["k_BNHK"][0, t, 0, :]
        if plan.gated:
            state_VK *= jnp.exp(refs["log_gate_BNH"][0, t, 0])
        e_V = refs["v_BNHV"][0, t, 0, :] - jnp.sum(state_VK * k_K[None], 1)
        size2, limit = jnp.sum(e_V * e_V) * jnp.sum(k_K * k_K), jnp.float32(clip**2)
        factor = jnp.where(size2 > limit, clip / jnp.sqrt(jnp.maximum(size2, limit)), 1.0)
        refs["e_BNHV"][0, t, 0, :] = e_V
        refs["factor_BNH"][0, t, 0] = factor
        state_VK += (refs["beta_BNH"][0, t, 0] * factor * e_V)[:, None] * k_K[None]
        return state_VK, clipped + (factor < 1).astype(jnp.float32)

    return lax.fori_loop(g * _CHUNK, (g + 1) * _CHUNK, token, (state_VK, clipped))


def _outputs(refs: dict[str, Any], plan: _Plan) -> None:
    chunk = _Chunk(refs, plan, pl.program_id(2))
    within_TV = _dot(_attention(chunk), chunk.rate() * chunk["e_BNHV"])
    read_TV = _dot(chunk["q_BNHK"], chunk["states_BGHVK"], (1, 1))
    chunk["o_BNHV"] = _times(chunk.since(), read_TV) + within_TV


def _reads(refs: dict[str, Any], plan: _Plan) -> None:
    chunk = _Chunk(refs, plan, pl.program_id(2))
    row, column = _indices()
    attention = _attention(chunk)
    chunk["du_BNHV"] = _dot(attention, chunk["do_BNHV"], (0, 0))
    u_TV = chunk.rate() * chunk["e_BNHV"]
    dproducts = jnp.where(row >= column, _dot(chunk["do_BNHV"], u_TV, (1, 1)), 0.0)
    dlog_gate_T = _through_products(dproducts * attention) if plan.gated else None
    dproducts = _times(chunk.between(), dproducts)
    chunk["dk_reads_BNHK"] = _dot(dproducts, chunk["q_BNHK"], (0, 0))
    _release(plan)
    read_TV = _times(chunk.since(), chunk["do_BNHV"])
    chunk["dstates_reads_BGHVK"] = _dot(read_TV, chunk["q_BNHK"], (0, 0))
    dq_TK = _dot(read_TV, chunk["states_BGHVK"])
    if dlog_gate_T is not None:
        dsince_T = jnp.sum(dq_TK * chunk["q_BNHK"], 1)
        chunk["dlog_gate_reads_BNH"] = dlog_gate_T + _through_since(dsince_T)
    chunk["dq_BNHK"] = dq_TK + _dot(dproducts, chunk["k_BNHK"])


def _through_products(dlogs: jax.Array) -> jax.Array:
    """The cotangents of log gates, given those of the logs of their products [T, T]."""
    row, column = _indices()
    sums = _dot((row >= column).astype(jnp.float32), dlogs, (0, 0))
    return jnp.sum(jnp.where(row > column, sums, 0.0), 1)


def _through_since(dlogs_T: jax.Array) -> jax.Array:
    """The cotangents of log gates, given those of their sums from the start of the chunk."""
    row, column = _indices()
    return jnp.sum(jnp.where(row >= column, dlogs_T[:, None], 0.0), 0)


def _errors(refs: dict[str, Any], plan: _Plan) -> None:
    def step(i: jax.Array, dstate_VK: jax.Array) -> jax.Array:
        g = plan.chunks - 1 - i
        chunk = _Chunk(refs, plan, g)
        chunk["dstates_BGHVK"] = dstate_VK

        def by_chunk() -> jax.Array:
            later_TV = _times(chunk.until(), _dot(chunk["k_BNHK"], dstate_VK, (1, 1), parts=3))
            du_TV = chunk["beta_BNH"][:, None] * (chunk["du_BNHV"] + later_TV)
            dr_TV = _dot(chunk["inverse_BGHTT"], du_TV, (0, 0), parts=3)
            chunk["dv_BNHV"] = dr_TV
            errors_VK = _dot(_times(chunk.since(), dr_TV), chunk["k_BNHK"], (0, 0), parts=3)
            return _times(chunk.whole(), dstate_VK) + chunk["dstates_reads_BGHVK"] - errors_VK

        if plan.clip is None:
            return by_chunk()
        by_token = functools.partial(_errors_by_tokens, refs, plan, g, dstate_VK)
        return lax.cond(jnp.min(chunk["factor_BNH"]) < 1, by_token, by_chunk)

    dlast_VK = refs["dlast_BHVK"][0, 0]
    refs["dstate_BHVK"][0, 0] = lax.fori_loop(0, plan.chunks, step, dlast_VK)


def _errors_by_tokens(
    refs: dict[str, Any], plan: _Plan, g: jax.Array, dstate_VK: jax.Array
) -> jax.Array:
    """Writes the cotangents of a chunk's values; returns that of the state before it."""

    def token(i: jax.Array, dstate_VK: jax.Array) -> jax.Array:
        t = (g + 1) * _CHUNK - 1 - i
        q_K, k_K, e_V, do_V = (
            refs[name][0, t, 0, :] for name in ("q_BNHK", "k_BNHK", "e_BNHV", "do_BNHV")
        )
        factor = refs["factor_BNH"][0, t, 0]
        rate = refs["beta_BNH"][0, t, 0] * factor
        dstate_VK += do_V[:, None] * q_K[None]
        dwrite_V = jnp.sum(dstate_VK * k_K[None], 1)
        # A clipped write has the direction of e, but not its size.
        along = jnp.sum(e_V * dwrite_V) / jnp.maximum(jnp.sum(e_V * e_V), 1e-30)
        dv_V = rate * (dwrite_V - jnp.where(factor < 1, along, 0.0) * e_V)
        refs["dv_BNHV"][0, t, 0, :] = dv_V
        dstate_VK -= dv_V[:, None] * k_K[None]
        if plan.gated:
            dstate_VK *= jnp.exp(refs["log_gate_BNH"][0, t, 0])
        return dstate_VK

    return lax.fori_loop(0, _CHUNK, token, dstate_VK)


def _writes(refs: dict[str, Any], plan: _Plan) -> None:
    chunk = _Chunk(refs, plan, pl.program_id(2))
    row, column = _indices()
    lower = _lower(chunk, chunk.between())
    dy_TV = chunk["du_BNHV"] - _dot(lower, chunk["dv_BNHV"], (0, 0), parts=3)
    _release(plan)
    dy_TV += _times(chunk.until(), _dot(chunk["k_BNHK"], chunk["dstates_BGHVK"], (1, 1), parts=3))
    _release(plan)
    drate_T = jnp.sum(dy_TV * chunk["e_BNHV"], 1)
    _release(plan)
    u_TV = chunk.rate() * chunk["e_BNHV"]
    dproducts = -jnp.where(row > column, _dot(chunk["dv_BNHV"], u_TV, (1, 1)), 0.0)
    dlog_gate_T = None
    if plan.gated:
        dlog_gate_T = _through_products(dproducts * lower)
    dproducts = _times(chunk.between(), dproducts)
    _release(plan)
    dk_TK = _dot(dproducts + dproducts.T, chunk["k_BNHK"])
    _release(plan)
    write_TK = _dot(_times(chunk.until(), chunk.rate() * chunk["e_BNHV"]), chunk["dstates_BGHVK"])
    dk_TK += write_TK
    _release(plan)
    error_TK = _dot(_times(chunk.since(), chunk["dv_BNHV"]), chunk["states_BGHVK"])
    dk_TK -= error_TK
    if dlog_gate_T is not None:
        dlog_gate_T += chunk["dlog_gate_reads_BNH"]
        dlog_gate_T -= _through_since(jnp.sum(error_TK * chunk["k_BNHK"], 1))
        duntil_T = jnp.sum(write_TK * chunk["k_BNHK"], 1)
        dlog_gate_T += jnp.sum(jnp.where(row > column, duntil_T[None], 0.0), 1)
        dwhole = jnp.sum(jnp.sum(chunk["dstates_BGHVK"] * chunk["states_BGHVK"], 0))
        chunk["dlog_gate_BNH"] = dlog_gate_T + _times(chunk.whole(), dwhole)
    _release(plan)
    if plan.clip is not None:
        # The factor clip / |e||k| in the rate: |e| is accounted for, |k| is not.
        factor_T = chunk["factor_BNH"]
        length2_T = jnp.maximum(_squares(chunk["k_BNHK"]), 1e-30)
        rate_T = chunk["beta_BNH"] * factor_T
        scale_T = jnp.where(factor_T < 1, rate_T * drate_T / length2_T, 0.0)
        dk_TK -= scale_T[:, None] * chunk["k_BNHK"]
        drate_T *= factor_T
    chunk["dk_BNHK"] = chunk["dk_reads_BNHK"] + dk_TK
    chunk["dbeta_BNH"] = drate_T


def _call(
    kernel: Callable[[dict[str, Any], _Plan], None],
    name: str,
    plan: _Plan,
    inputs: dict[str, jax.Array],
    outputs: dict[str, tuple[int, ...]],
) -> dict[str, jax.Array]:
    """Runs a kernel on every sequence and head, and on every chunk but in the two that walk."""
    B, _, H, _ = inputs["k_BNHK"].shape
    return call(
        lambda refs: kernel(refs, plan), name, inputs, outputs,
        grid=(B, H) if kernel in (_states, _errors) else (B, H, plan.chunks),
        parts={}, warps=plan.warps, interpret=plan.interpret,
    )  # fmt: skip
