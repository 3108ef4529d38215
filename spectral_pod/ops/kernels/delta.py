"""The delta rule in two kernels for TPUs, forward and backward; the state stays on the chip.

The form is that of `delta_chunks.py`, derived in docs/math.md, 4.3; here in one pass over the
chunks of a sequence, from the first to the last, and back. HBM sees the inputs, the outputs, and
what the backward pass reads again: the errors E, the matrices P, and the state before each chunk.
P is read because the matrix unit is the busier one, and would be needed to invert again.

A chunk has T tokens and a head T keys and T values, so that all matrices of a head are [T, T].
`delta_passes.py` computes with them, and `head_tiles.py` has the operations. The state is kept as
its transpose, [K, V].

A product of float32 factors is three or six products of bfloat16. Where a key repeats, errors of
the tokens of a chunk do not decay but add up: in P and E, in what the tokens write and read, and in
the cotangents of E. Those products are six. All results are then within 2e-5 of the largest, even
for one key in all tokens; with three products throughout, some were 8e-5 off.

A chunk is first computed as if no write was clipped. If an upper bound on |e||k| then exceeds the
clip, it is computed again, token by token: this recursion is exact whatever the keys are, and takes
its time only where writes are clipped. A fixpoint of the chunked form takes fewer steps, but it
needs the recursion as well, for keys with which it does not converge.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spectral_pod.ops.delta_recurrence import DeltaInputs, DeltaResult, pad_tokens
from spectral_pod.ops.kernels import delta_passes
from spectral_pod.ops.kernels.cost import with_cost
from spectral_pod.ops.kernels.delta_passes import Plan
from spectral_pod.ops.kernels.head_tiles import LANES
from spectral_pod.parallel.sharding import platform

_ROWS = 512  # of the tiles of a grid cell, whose products fill each other's latencies

# Log gates are sums of multiples of this and a remainder, so that sums of the former are exact.
_GATE_STEP = 2.0**-10
_LOWEST_LOG_GATE = -128.0  # its exponential is zero


def unserved(key_width: int, value_width: int) -> str | None:
    """Why the kernels cannot compute these sizes on the current mesh; None if they can."""
    if platform() != "tpu":
        return f"it is a kernel for TPUs, and this is a {platform()}"
    if max(key_width, value_width) > LANES:
        return (
            f"keys and values have at most {LANES} entries, and not {key_width} and {value_width}"
        )
    return None


def delta_rule(
    inputs: DeltaInputs, state_BHVK: jax.Array, clip: float | None, *, interpret: bool = False
) -> DeltaResult:
    """The same function as `delta_rule_recurrent`, in float32.

    Args:
      inputs, state_BHVK, clip: as in `delta_rule_recurrent`, float32; any sizes up to K, V = 128.
        Keys and values are padded to 64 or 128 entries, tokens to a multiple of that, and heads of
        up to 64 entries to an even number.
      interpret: runs the kernels as ordinary JAX operations, on any platform.

    Raises:
      ValueError: `unserved` gives a reason.
    """
    B, N, H, K = inputs.k.shape
    V = inputs.v.shape[-1]
    if not interpret and (reason := unserved(K, V)):
        raise ValueError(f"the delta rule cannot use method 'fused': {reason}")
    T = LANES // 2 if max(K, V) <= LANES // 2 else LANES
    heads = H + -H % (LANES // T)
    tiles = heads * T // LANES
    in_cell = _largest_divisor(tiles, _ROWS // T)
    plan = Plan(
        T, in_cell, _largest_divisor(B, _ROWS // T // in_cell), clip, inputs.log_gate is not None,
        interpret,
    )  # fmt: skip
    inputs = jax.tree.map(lambda x: pad_tokens(x, N + -N % T), inputs)

    def lanes(x_BNHK: jax.Array) -> jax.Array:
        pads = [(0, 0), (0, 0), (0, heads - H), (0, T - x_BNHK.shape[-1])]
        return jnp.pad(x_BNHK, pads).reshape(*x_BNHK.shape[:2], heads * T)

    def rows(x_BNH: jax.Array) -> jax.Array:
        x_BNH = jnp.pad(x_BNH, [(0, 0), (0, 0), (0, heads - H)])
        return x_BNH.reshape(B, -1, T, heads).swapaxes(2, 3).reshape(B, -1, heads * T)

    scalars = [rows(inputs.beta)]
    if inputs.log_gate is not None:
        log_gate_BNH = jnp.maximum(inputs.log_gate, _LOWEST_LOG_GATE)
        step_BNH = jax.lax.stop_gradient(jnp.round(log_gate_BNH / _GATE_STEP) * _GATE_STEP)
        for part_BNH in (step_BNH, log_gate_BNH - step_BNH):
            since = jnp.cumsum(part_BNH.reshape(B, -1, T, H), 2)
            scalars.append(rows(since.reshape(part_BNH.shape)))
    q, k, v = (lanes(x) for x in inputs[:3])
    state = lanes(pad_tokens(jnp.moveaxis(state_BHVK, 3, 1), T))
    o, state, clipped = _delta(q, k, v, jnp.stack(scalars, 2), state, plan)

    def narrow(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, T)[:, :, :H, :V]

    state_BHVK = jnp.moveaxis(narrow(state)[:, :K], 1, 3)
    clipped_BH = clipped.reshape(B, heads, T)[:, :H, 0]
    return DeltaResult(narrow(o)[:, :N], state_BHVK, clipped_BH)


def _largest_divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if n % d == 0)


_Triple = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _delta(
    q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, state: jax.Array, plan: Plan
) -> _Triple:
    return _delta_forward(q, k, v, scalars, state, plan)[0]


def _delta_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, state: jax.Array, plan: Plan
) -> tuple[_Triple, Any]:
    B, _, width = q.shape
    count = jax.ShapeDtypeStruct((B, 1, width), jnp.float32)
    o, e, inverse, states, state, clipped = _call(
        delta_passes.forward,
        "delta_forward",
        plan,
        [q, k, v, scalars, state],
        [q, q, q, q],
        [state, count],
    )
    return (o, state, clipped), (q, k, scalars, e, inverse, states)


def _delta_backward(plan: Plan, residuals: Any, cotangents: _Triple) -> tuple[jax.Array, ...]:
    do, dstate, _ = cotangents
    q, _, scalars, *_ = residuals
    inputs, outputs = [*residuals, do, dstate], [q, q, q, scalars]
    return tuple(_call(delta_passes.backward, "delta_backward", plan, inputs, outputs, [dstate]))


_delta.defvjp(_delta_forward, _delta_backward)


def _call(
    kernel: Callable[..., None],
    name: str,
    plan: Plan,
    inputs: Sequence[jax.Array],
    outputs: Sequence[Any],
    totals: Sequence[Any],
) -> Sequence[jax.Array]:
    """Runs a kernel over groups of sequences, of tiles, and innermost over chunks.

    The last input and `totals`, which are outputs as well, belong to a whole sequence.
    """
    B, N, width = inputs[0].shape
    T, lanes = plan.tokens, plan.tiles * LANES
    chunks = N // T
    tile = pltpu.VMEM((plan.sequences * plan.tiles, T, LANES), jnp.float32)
    scratch = [tile] * 4
    if kernel is delta_passes.backward:
        scratch = [pltpu.VMEM((plan.sequences, T, lanes), jnp.float32), *scratch]
    varying = jax.typeof(inputs[0]).manual_axis_type

    def build(cost: pl.CostEstimate | None) -> Callable[..., Any]:
        # The cost is that of a pass in which no write is clipped, and the same in either direction.
        counted = cost is None
        reverse = kernel is delta_passes.backward and not counted
        run = dataclasses.replace(plan, clip=None) if counted else plan

        def of_chunk(x: Any) -> pl.BlockSpec:
            def index(b: Any, j: Any, g: Any) -> tuple[Any, ...]:
                g = chunks - 1 - g if reverse else g
                return (b, g, 0, j) if x.ndim == 4 else (b, g, j)

            shape = (1, x.shape[2]) if x.ndim == 4 else (T,)
            return pl.BlockSpec((plan.sequences, *shape, lanes), index)

        def of_sequence(x: Any) -> pl.BlockSpec:
            return pl.BlockSpec((plan.sequences, x.shape[1], lanes), lambda b, j, g: (b, 0, j))

        return pl.pallas_call(
            functools.partial(kernel, plan=run),
            name=name,
            grid=(B // plan.sequences, width // lanes, chunks),
            in_specs=[*map(of_chunk, inputs[:-1]), of_sequence(inputs[-1])],
            out_specs=[*map(of_chunk, outputs), *map(of_sequence, totals)],
            out_shape=[
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
                for x in (*outputs, *totals)
            ],
            scratch_shapes=scratch,
            interpret=plan.interpret,
            cost_estimate=cost,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
        )

    return with_cost(build, inputs)
