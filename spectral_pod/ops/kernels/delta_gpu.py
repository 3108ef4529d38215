"""The delta rule as its recurrence, with the state in registers: kernels for GPUs.

A program has a head of a sequence and walks through its tokens, forward and back; the next token is
read while one is computed. All sums are of float32 products, so the results are those of the
definition, `delta_recurrence.py`, clips included. Without clips the rows of a state, [V, K], do not
depend on each other, and several programs have some each: a few of them in one warp, which needs no
barriers. A clip needs the error of all rows.

For gradients, the forward pass also saves the error of every token, of the size of v, and a state
per `SEGMENT` tokens. With the errors, the backward pass computes the states again in registers,
without sums over keys. Storing them for all tokens would write and read K / 4 times the bytes of
q, k, the errors and do, which caches do not hold.

- Without gates, a write is subtracted from the state after it. Its rounding errors add up only
  until the next saved state.
- A small gate would amplify them without bound. So with gates, the state before a token is computed
  from one at the start of its `_BLOCK`, and that from a saved state, by the writes between them: 5
  writes a token on average, of two operations an entry, where the gradients take nine.

The kernels are written in Pallas for its Triton back end. Letters here: J parts of the rows V of a
state, G saved states: those before each segment, and the last. The others are in `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectral_pod.ops.delta_recurrence import SEGMENT, DeltaInputs, DeltaResult
from spectral_pod.ops.kernels.delta_gpu_calls import call, named, padded
from spectral_pod.parallel.sharding import platform

_MAX_WIDTH = 128  # of keys and of values
_ROWS = 16  # of a state in a program, where they are independent
_ENTRIES_PER_WARP = 1024  # of a state: 32 registers of a thread, of which the backward pass has 3
_BLOCK = 8  # tokens, of a segment


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one call, after padding."""

    tokens: int  # a multiple of SEGMENT
    rows: int  # of a state in a program
    parts: int  # of the rows of a state
    clip: float | None
    gated: bool
    interpret: bool


def unserved(key_width: int, value_width: int) -> str | None:
    """Why the kernels cannot compute these sizes on the current mesh; None if they can."""
    if platform() != "gpu":
        return f"it is a kernel for GPUs, and this is a {platform()}"
    if max(key_width, value_width) > _MAX_WIDTH:
        return (
            f"keys and values have at most {_MAX_WIDTH} entries, and not {key_width} and "
            f"{value_width}"
        )
    return None


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
        raise ValueError(f"the delta rule cannot use method 'fused': {reason}")
    inputs, state_BHVK = padded(inputs, state_BHVK, SEGMENT)
    tokens, values = inputs.v.shape[1], inputs.v.shape[3]
    rows = values if clip is not None else min(_ROWS, values)
    plan = _Plan(tokens, rows, values // rows, clip, inputs.log_gate is not None, interpret)
    o_BNHV, state_BHVK, clipped_BH = _delta(inputs, state_BHVK, plan)
    return DeltaResult(o_BNHV[:, :N, :, :V], state_BHVK[:, :, :V, :K], clipped_BH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _delta(inputs: DeltaInputs, state_BHVK: jax.Array, plan: _Plan) -> DeltaResult:
    o_BNHV, last_BHVK, clipped_JBH = _run_forward(inputs, state_BHVK, plan, {})
    return DeltaResult(o_BNHV, last_BHVK, clipped_JBH.sum(0))


def _delta_forward(
    inputs: DeltaInputs, state_BHVK: jax.Array, plan: _Plan
) -> tuple[DeltaResult, dict[str, jax.Array]]:
    B, H, V, K = state_BHVK.shape
    saved = {
        "e_BNHV": inputs.v.shape,
        "states_BGHVK": (B, plan.tokens // SEGMENT + 1, H, V, K),
    }
    if plan.clip is not None:
        saved["factor_BNH"] = inputs.beta.shape
    o_BNHV, last_BHVK, clipped_JBH, *arrays = _run_forward(inputs, state_BHVK, plan, saved)
    operands = named(inputs) | dict(zip(saved, arrays, strict=True))
    del operands["v_BNHV"]
    return DeltaResult(o_BNHV, last_BHVK, clipped_JBH.sum(0)), operands


def _run_forward(
    inputs: DeltaInputs, state_BHVK: jax.Array, plan: _Plan, saved: dict[str, tuple[int, ...]]
) -> Sequence[jax.Array]:
    B, H, _, _ = state_BHVK.shape
    results = {
        "o_BNHV": inputs.v.shape,
        "last_BHVK": state_BHVK.shape,
        "clipped_JBH": (plan.parts, B, H),
    }
    operands = named(inputs) | {"state_BHVK": state_BHVK}
    return _call(_forward, "delta_forward", plan, operands, results | saved)


def _delta_backward(
    plan: _Plan, operands: dict[str, jax.Array], cotangents: DeltaResult
) -> tuple[DeltaInputs, jax.Array]:
    do_BNHV, dlast_BHVK, _ = cotangents
    outputs = {
        "dq_JBNHK": (plan.parts, *operands["q_BNHK"].shape),
        "dk_JBNHK": (plan.parts, *operands["k_BNHK"].shape),
        "dv_BNHV": do_BNHV.shape,
        "dbeta_JBNH": (plan.parts, *operands["beta_BNH"].shape),
        "dlog_gate_JBNH": (plan.parts, *operands["beta_BNH"].shape),
        "dstate_BHVK": dlast_BHVK.shape,
    }
    if not plan.gated:
        del outputs["dlog_gate_JBNH"]
    operands = operands | {"do_BNHV": do_BNHV, "dlast_BHVK": dlast_BHVK}
    dq, dk, dv_BNHV, *scalars, dstate_BHVK = _call(
        _backward, "delta_backward", plan, operands, outputs
    )
    dq, dk, *scalars = (x.sum(0) for x in (dq, dk, *scalars))
    return DeltaInputs(dq, dk, dv_BNHV, *scalars), dstate_BHVK


_delta.defvjp(_delta_forward, _delta_backward)


def _forward(refs: dict[str, Any], plan: _Plan) -> None:
    # States before segments, and the sums of what follows, are float32 [V, K] throughout.
    read = functools.partial(_read, refs, plan, ("q_BNHK", "k_BNHK", "v_BNHV"))

    def save(name: str, at: tuple[Any, ...], x: jax.Array) -> None:
        if name in refs:  # for gradients only
            refs[name][at] = x

    def token(t: jax.Array, carry: Any) -> Any:
        state_VK, clipped, ((q_K, k_K, v_V), beta, gate) = carry
        following = read(jnp.minimum(t + 1, plan.tokens - 1))
        if gate is not None:
            state_VK *= gate
        e_V = v_V - jnp.sum(state_VK * k_K[None], 1)
        save("e_BNHV", (0, t, 0, slice(None)), e_V)
        write_V = beta * e_V
        if plan.clip is not None:
            size2, limit = jnp.sum(e_V * e_V) * jnp.sum(k_K * k_K), jnp.float32(plan.clip**2)
            factor = jnp.where(size2 > limit, plan.clip / jnp.sqrt(jnp.maximum(size2, limit)), 1.0)
            save("factor_BNH", (0, t, 0), factor)
            write_V *= factor
            clipped += jnp.where(factor < 1, jnp.float32(1), jnp.float32(0))
        # S q from the state before the write, which does not wait for the sum S k.
        refs["o_BNHV"][0, t, 0, :] = jnp.sum(state_VK * q_K[None], 1) + jnp.sum(k_K * q_K) * write_V
        return state_VK + write_V[:, None] * k_K[None], clipped, following

    def segment(g: jax.Array, carry: Any) -> Any:
        save("states_BGHVK", (0, g, 0), carry[0])
        return lax.fori_loop(g * SEGMENT, (g + 1) * SEGMENT, token, carry)

    segments = plan.tokens // SEGMENT
    first = refs["state_BHVK"][0, 0], jnp.float32(0), read(0)
    state_VK, clipped, _ = lax.fori_loop(0, segments, segment, first)
    save("states_BGHVK", (0, segments, 0), state_VK)
    refs["last_BHVK"][0, 0] = state_VK
    refs["clipped_JBH"][0, 0, 0] = clipped


def _backward(refs: dict[str, Any], plan: _Plan) -> None:
    read = functools.partial(_read_saved, refs, plan, ("q_BNHK", "k_BNHK", "e_BNHV", "do_BNHV"))
    length = _BLOCK if plan.gated else SEGMENT

    def walk(i: jax.Array, carry: Any) -> Any:
        start = plan.tokens - (i + 1) * length
        g = lax.div(start, SEGMENT)
        if plan.gated:
            state_VK = _later(refs, plan, refs["states_BGHVK"][0, g, 0], g * SEGMENT, start)
        else:
            state_VK = refs["states_BGHVK"][0, g + 1, 0]

        def token(r: jax.Array, carry: Any) -> Any:
            dstate_VK, state_VK, current = carry
            (_, k_K, e_V, _), beta, gate, factor = current
            t = start + length - 1 - r
            following = read(jnp.maximum(t - 1, 0))
            if plan.gated:
                decayed_VK = _later(refs, plan, state_VK, start, t) * gate
            else:
                state_VK = decayed_VK = state_VK - _write(e_V, beta, factor)[:, None] * k_K[None]
            dstate_VK = _cotangents(refs, t, current, decayed_VK, dstate_VK)
            return dstate_VK, state_VK, following

        dstate_VK, current = carry
        dstate_VK, _, current = lax.fori_loop(0, length, token, (dstate_VK, state_VK, current))
        return dstate_VK, current

    last = refs["dlast_BHVK"][0, 0], read(plan.tokens - 1)
    refs["dstate_BHVK"][0, 0] = lax.fori_loop(0, plan.tokens // length, walk, last)[0]


def _later(refs: dict[str, Any], plan: _Plan, state_VK: jax.Array, start: Any, stop: Any) -> Any:
    """The state before token `stop`, from that before token `start`."""
    read = functools.partial(_read_saved, refs, plan, ("k_BNHK", "e_BNHV"))

    def token(t: jax.Array, carry: Any) -> Any:
        state_VK, ((k_K, e_V), beta, gate, factor) = carry
        following = read(jnp.minimum(t + 1, plan.tokens - 1))
        write_V = _write(e_V, beta, factor)
        return gate * state_VK + write_V[:, None] * k_K[None], following

    return lax.fori_loop(start, stop, token, (state_VK, read(start)))[0]


def _cotangents(
    refs: dict[str, Any],
    t: jax.Array,
    current: Any,
    state_VK: jax.Array,
    dstate_VK: jax.Array,
) -> jax.Array:
    """Writes the cotangents of token t.

    Args:
      current: the token's values, as `_read_saved` gives them.
      state_VK: the decayed state that it is written to.
      dstate_VK: the cotangent of the state after the token, but for the read of the token itself.

    Returns: that of the state before the token.
    """
    (q_K, k_K, e_V, do_V), beta, gate, factor = current
    write_V = _write(e_V, beta, factor)
    refs["dq_JBNHK"][0, 0, t, 0, :] = (
        jnp.sum(state_VK * do_V[:, None], 0) + jnp.sum(write_V * do_V) * k_K
    )
    dstate_VK += do_V[:, None] * q_K[None]
    dwrite_V = jnp.sum(dstate_VK * k_K[None], 1)
    along = jnp.sum(e_V * dwrite_V)
    de_V = _write(dwrite_V, beta, factor)
    if factor is not None:
        along *= factor
        # A clipped write has the direction of e k^T, but not its size.
        along_e, along_k = (
            jnp.where(factor < 1, beta * along / jnp.maximum(jnp.sum(x * x), 1e-30), 0.0)
            for x in (e_V, k_K)
        )
        de_V -= along_e * e_V
    dk_K = jnp.sum(dstate_VK * write_V[:, None] - state_VK * de_V[:, None], 0)
    if factor is not None:
        dk_K -= along_k * k_K
    refs["dbeta_JBNH"][0, 0, t, 0] = along
    refs["dk_JBNHK"][0, 0, t, 0, :] = dk_K
    refs["dv_BNHV"][0, t, 0, :] = de_V
    dstate_VK -= de_V[:, None] * k_K[None]
    if gate is not None:
        # Over rows first: those of a column are mostly in one thread.
        refs["dlog_gate_JBNH"][0, 0, t, 0] = jnp.sum(jnp.sum(dstate_VK * state_VK, 0))
        dstate_VK *= gate
    return dstate_VK


def _read(refs: dict[str, Any], plan: _Plan, names: Sequence[str], t: Any) -> Any:
    """The vectors of token t with these names, its write strength, and its gate or None."""
    vectors = tuple(refs[name][0, t, 0, :] for name in names)
    gate = jnp.exp(refs["log_gate_BNH"][0, t, 0]) if plan.gated else None
    return vectors, refs["beta_BNH"][0, t, 0], gate


def _read_saved(refs: dict[str, Any], plan: _Plan, names: Sequence[str], t: Any) -> Any:
    """As `_read`, and the factor that clipped the write, or None without clips."""
    factor = None if plan.clip is None else refs["factor_BNH"][0, t, 0]
    return *_read(refs, plan, names, t), factor


def _write(e_V: jax.Array, beta: jax.Array, factor: jax.Array | None) -> jax.Array:
    return beta * e_V if factor is None else beta * factor * e_V


def _call(
    kernel: Callable[[dict[str, Any], _Plan], None],
    name: str,
    plan: _Plan,
    inputs: dict[str, jax.Array],
    outputs: dict[str, tuple[int, ...]],
) -> Sequence[jax.Array]:
    """Runs a kernel on every sequence, head, and group J of rows, of whose sums each has a part."""
    B, _, H, K = inputs["k_BNHK"].shape
    found = call(
        lambda refs: kernel(refs, plan), name, inputs, outputs, grid=(B, H, plan.parts),
        parts={"J": 1, "V": plan.rows}, warps=max(1, plan.rows * K // _ENTRIES_PER_WARP),
        interpret=plan.interpret,
    )  # fmt: skip
    return [*found.values()]
