"""The delta rule as its recurrence, with the state in registers: kernels for GPUs.

A program has a head of a sequence and walks through its tokens, forward and back; the next token is
read while one is computed. All sums are of float32 products, so the results are those of the
definition, `delta_recurrence.py`, clips included. Without clips the rows of a state, [V, K], do not
depend on each other, and several programs have some each: a few of them in one warp, which needs no
barriers. A clip needs the error of all rows.

The backward pass reads one state per `SEGMENT` tokens, computes those of a segment again, into a
buffer in global memory that the cache holds, and goes back over them.

The kernels are written in Pallas for its Triton back end. Letters here: J parts of
the rows V of a state. The others are in `shapes.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spectral_pod.ops.delta_recurrence import SEGMENT, DeltaInputs, DeltaResult, pad_tokens
from spectral_pod.parallel.sharding import platform

_MAX_WIDTH = 128  # of keys and of values
_MIN_WIDTH = 16
_ROWS = 16  # of a state in a program, where they are independent
_ENTRIES_PER_WARP = 1024  # of a state: 32 registers of a thread, of which the backward pass has 3


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Static sizes of one call, after padding."""

    tokens: int  # a multiple of SEGMENT
    rows: int  # of a state in a program
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
    keys, values = (max(pl.next_power_of_2(width), _MIN_WIDTH) for width in (K, V))
    tokens = pl.cdiv(N, SEGMENT) * SEGMENT
    rows = values if clip is not None else min(_ROWS, values)
    plan = _Plan(tokens, rows, clip, inputs.log_gate is not None, interpret)

    def widen(x: jax.Array, *widths: int) -> jax.Array:
        kept = [(0, 0)] * (x.ndim - len(widths))
        return jnp.pad(x, [*kept, *((0, n - w) for n, w in zip(widths, x.shape[-len(widths) :]))])

    q, k, v, *scalars = (pad_tokens(x, tokens) for x in inputs if x is not None)
    state_BHVK = widen(state_BHVK, values, keys)
    inputs = DeltaInputs(widen(q, keys), widen(k, keys), widen(v, values), *scalars)
    o_BNHV, state_BHVK, clipped_BH = _delta(inputs, state_BHVK, plan)
    return DeltaResult(o_BNHV[:, :N, :, :V], state_BHVK[:, :, :V, :K], clipped_BH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _delta(inputs: DeltaInputs, state_BHVK: jax.Array, plan: _Plan) -> DeltaResult:
    return _delta_forward(inputs, state_BHVK, plan)[0]


def _delta_forward(
    inputs: DeltaInputs, state_BHVK: jax.Array, plan: _Plan
) -> tuple[DeltaResult, tuple[DeltaInputs, jax.Array]]:
    B, H, V, K = state_BHVK.shape
    o_BNHV, states, last_BHVK, clipped_JBH = _call(
        _forward,
        "delta_forward",
        plan,
        _operands(inputs, state_BHVK=state_BHVK),
        {
            "o_BNHV": inputs.v.shape,
            "states_BGHVK": (B, plan.tokens // SEGMENT, H, V, K),
            "last_BHVK": state_BHVK.shape,
            "clipped_JBH": (V // plan.rows, B, H),
        },
    )
    return DeltaResult(o_BNHV, last_BHVK, clipped_JBH.sum(0)), (inputs, states)


def _delta_backward(
    plan: _Plan, residuals: tuple[DeltaInputs, jax.Array], cotangents: DeltaResult
) -> tuple[DeltaInputs, jax.Array]:
    inputs, states = residuals
    do_BNHV, dlast_BHVK, _ = cotangents
    B, H, V, K = dlast_BHVK.shape
    parts = V // plan.rows
    outputs = {
        "dq_JBNHK": (parts, *inputs.q.shape),
        "dk_JBNHK": (parts, *inputs.k.shape),
        "dv_BNHV": inputs.v.shape,
        "dbeta_JBNH": (parts, *inputs.beta.shape),
        "dlog_gate_JBNH": (parts, *inputs.beta.shape),
        "dstate_BHVK": dlast_BHVK.shape,
        "buffer_BHTVK": (B, H, SEGMENT, V, K),
    }
    if not plan.gated:
        del outputs["dlog_gate_JBNH"]
    operands = _operands(inputs, states_BGHVK=states, do_BNHV=do_BNHV, dlast_BHVK=dlast_BHVK)
    dq, dk, dv_BNHV, *scalars, dstate_BHVK, _ = _call(
        _backward, "delta_backward", plan, operands, outputs
    )
    dq, dk, *scalars = (x.sum(0) for x in (dq, dk, *scalars))
    return DeltaInputs(dq, dk, dv_BNHV, *scalars), dstate_BHVK


_delta.defvjp(_delta_forward, _delta_backward)


def _operands(inputs: DeltaInputs, **others: jax.Array) -> dict[str, jax.Array]:
    names = "q_BNHK", "k_BNHK", "v_BNHV", "beta_BNH", "log_gate_BNH"
    named = {name: x for name, x in zip(names, inputs, strict=True) if x is not None}
    return named | others


def _forward(refs: dict[str, Any], plan: _Plan) -> None:
    # States before segments, and the sums of what follows, are float32 [V, K] throughout.
    read = functools.partial(_read, refs, plan, ("q_BNHK", "k_BNHK", "v_BNHV"))

    def token(t: jax.Array, carry: Any) -> Any:
        state_VK, clipped, ((q_K, k_K, v_V), beta, gate) = carry
        following = read(jnp.minimum(t + 1, plan.tokens - 1))
        state_VK, e_V, _, _, factor = _errors(state_VK, k_K, v_V, gate, plan)
        write_V = beta * factor * e_V
        # S q from the state before the write, which does not wait for the sum S k.
        refs["o_BNHV"][0, t, 0, :] = jnp.sum(state_VK * q_K[None], 1) + jnp.sum(k_K * q_K) * write_V
        if plan.clip is not None:
            clipped += jnp.where(factor < 1, jnp.float32(1), jnp.float32(0))
        return state_VK + write_V[:, None] * k_K[None], clipped, following

    def segment(g: jax.Array, carry: Any) -> Any:
        refs["states_BGHVK"][0, g, 0] = carry[0]
        return lax.fori_loop(g * SEGMENT, (g + 1) * SEGMENT, token, carry)

    first = refs["state_BHVK"][0, 0], jnp.float32(0), read(0)
    state_VK, clipped, _ = lax.fori_loop(0, plan.tokens // SEGMENT, segment, first)
    refs["last_BHVK"][0, 0] = state_VK
    refs["clipped_JBH"][0, 0, 0] = clipped


def _backward(refs: dict[str, Any], plan: _Plan) -> None:
    segments = plan.tokens // SEGMENT
    read = functools.partial(_read, refs, plan, ("q_BNHK", "k_BNHK", "v_BNHV", "do_BNHV"))
    read_writes = functools.partial(_read, refs, plan, ("k_BNHK", "v_BNHV"))
    buffer = refs["buffer_BHTVK"]

    def segment(i: jax.Array, dstate_VK: jax.Array) -> jax.Array:
        g = segments - 1 - i
        start = g * SEGMENT

        def again(r: jax.Array, carry: Any) -> Any:
            state_VK, ((k_K, v_V), beta, gate) = carry
            following = read_writes(jnp.minimum(start + r + 1, plan.tokens - 1))
            buffer[0, 0, r] = state_VK
            state_VK, e_V, _, _, factor = _errors(state_VK, k_K, v_V, gate, plan)
            return state_VK + (beta * factor * e_V)[:, None] * k_K[None], following

        lax.fori_loop(0, SEGMENT, again, (refs["states_BGHVK"][0, g, 0], read_writes(start)))
        if not plan.interpret:
            plgpu.debug_barrier()  # a thread may read what others have written

        def token(i: jax.Array, carry: Any) -> Any:
            dstate_VK, before_VK, ((q_K, k_K, v_V, do_V), beta, gate) = carry
            r = SEGMENT - 1 - i
            t, preceding = start + r, jnp.maximum(r - 1, 0)
            following = buffer[0, 0, preceding], read(start + preceding)
            state_VK, e_V, e2, k2, factor = _errors(before_VK, k_K, v_V, gate, plan)
            write_V = beta * factor * e_V
            dq_K = jnp.sum(state_VK * do_V[:, None], 0) + jnp.sum(write_V * do_V) * k_K
            dstate_VK += do_V[:, None] * q_K[None]
            dwrite_V = jnp.sum(dstate_VK * k_K[None], 1)
            along = jnp.sum(e_V * dwrite_V)
            # A clipped write has the direction of e k^T, but not its size.
            along_e, along_k = (
                jnp.where(factor < 1, along / jnp.maximum(size, 1e-30), 0.0) for size in (e2, k2)
            )
            de_V = beta * factor * (dwrite_V - along_e * e_V)
            dk_K = jnp.sum(dstate_VK * write_V[:, None] - state_VK * de_V[:, None], 0)
            refs["dq_JBNHK"][0, 0, t, 0, :] = dq_K
            refs["dk_JBNHK"][0, 0, t, 0, :] = dk_K - beta * factor * along_k * k_K
            refs["dv_BNHV"][0, t, 0, :] = de_V
            refs["dbeta_JBNH"][0, 0, t, 0] = factor * along
            dstate_VK -= de_V[:, None] * k_K[None]
            if gate is not None:
                refs["dlog_gate_JBNH"][0, 0, t, 0] = jnp.sum(dstate_VK * state_VK)
                dstate_VK *= gate
            return dstate_VK, *following

        end = SEGMENT - 1
        last = dstate_VK, buffer[0, 0, end], read(start + end)
        return lax.fori_loop(0, SEGMENT, token, last)[0]

    dlast_VK = refs["dlast_BHVK"][0, 0]
    refs["dstate_BHVK"][0, 0] = lax.fori_loop(0, segments, segment, dlast_VK)


def _read(refs: dict[str, Any], plan: _Plan, names: Sequence[str], t: Any) -> Any:
    """The vectors of token t with these names, its write strength, and its gate or None."""
    vectors = tuple(refs[name][0, t, 0, :] for name in names)
    gate = jnp.exp(refs["log_gate_BNH"][0, t, 0]) if plan.gated else None
    return vectors, refs["beta_BNH"][0, t, 0], gate


def _errors(
    state_VK: jax.Array, k_K: jax.Array, v_V: jax.Array, gate: jax.Array | None, plan: _Plan
) -> tuple[jax.Array, ...]:
    """The decayed state, the error e, |e|^2, |k|^2, and the factor that clips the write."""
    if gate is not None:
        state_VK = state_VK * gate
    e_V = v_V - jnp.sum(state_VK * k_K[None], 1)
    e2, k2 = jnp.sum(e_V * e_V), jnp.sum(k_K * k_K)
    factor = jnp.float32(1)
    if plan.clip is not None:
        limit = jnp.float32(plan.clip**2)
        factor = jnp.where(e2 * k2 > limit, plan.clip / jnp.sqrt(jnp.maximum(e2 * k2, limit)), 1.0)
    return state_VK, e_V, e2, k2, factor


def _call(
    kernel: Callable[[dict[str, Any], _Plan], None],
    name: str,
    plan: _Plan,
    inputs: dict[str, jax.Array],
    outputs: dict[str, tuple[int, ...]],
) -> Sequence[jax.Array]:
    """Runs a kernel on every sequence, head, and group J of rows.

    The last part of a name has the dimensions of an array, of which a program sees its own sequence
    and head, its rows V, and its part J of a sum over rows.
    """
    B, _, H, K = inputs["k_BNHK"].shape
    values = inputs["v_BNHV"].shape[-1]

    def spec(item: tuple[str, Any]) -> pl.BlockSpec:
        name, x = item
        letters, shape = name.rpartition("_")[2], getattr(x, "shape", x)
        sizes = {"B": 1, "H": 1, "J": 1, "V": plan.rows}

        def index(b: Any, h: Any, j: Any) -> tuple[Any, ...]:
            at = {"B": b, "H": h, "J": j, "V": j}
            return tuple(at.get(letter, 0) for letter in letters)

        return pl.BlockSpec(
            tuple(sizes.get(letter, n) for letter, n in zip(letters, shape, strict=True)), index
        )

    names = [*inputs, *outputs]
    varying = jax.typeof(inputs["k_BNHK"]).manual_axis_type
    return pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True)), plan),
        name=name,
        grid=(B, H, values // plan.rows),
        in_specs=[*map(spec, inputs.items())],
        out_specs=[*map(spec, outputs.items())],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
            for shape in outputs.values()
        ],
        interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(
            num_warps=max(1, plan.rows * K // _ENTRIES_PER_WARP), num_stages=1
        ),
    )(*inputs.values())
