"""The delta rule with the positions of a sequence split over devices.

Every function here runs under `shard_map`, on each device's own shard of the positions. Without
clipping, the state after a shard is affine in the state before it, S' = S M + b, and cotangents are
affine in the other direction, dS = dS' M^T + c. All devices gather the pairs M [K, K] and b, the
only communication whatever the length, and compose those of the preceding shards to get the state
that their own shard starts from.

If a write is clipped anywhere, that state is invalid. Then, and only then, each device waits for
the exact state from the device before it. All devices of the mesh take the same branch, so that
none waits in a collective that others do not join.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from spectral_pod.ops.delta_recurrence import DeltaInputs, DeltaResult, dot
from spectral_pod.parallel.sharding import SEQUENCE

_Pair = tuple[jax.Array, jax.Array]


@runtime_checkable
class Form(Protocol):
    """The functions of `delta_chunks.py` and of `delta_batched.py`."""

    def cut(self, inputs: DeltaInputs, clip: float | None) -> tuple[Any, DeltaInputs]:
        """A plan, and the inputs padded to what it wants."""

    def forward(
        self, plan: Any, inputs: DeltaInputs, state_BHVK: jax.Array
    ) -> tuple[DeltaResult, Any]:
        """The result, and residuals. Their `clipped` is true anywhere if a write was clipped, and
        None without a clip; their `states[0]` is the state before the shard."""

    def backward(
        self, plan: Any, residuals: Any, cotangents: DeltaResult
    ) -> tuple[DeltaInputs, jax.Array]:
        """The cotangents of the inputs and the state."""

    def affine_map(self, plan: Any, inputs: DeltaInputs) -> _Pair:
        """M and b without a clip."""


class _Saved(NamedTuple):
    residuals: Any  # of `Form.forward`
    transition_BHKK: jax.Array  # M
    clipped: jax.Array  # whether a write was clipped on any device


def delta_rule_split(
    form: Form, inputs: DeltaInputs, state_BHVK: jax.Array, clip: float | None = None
) -> DeltaResult:
    """The delta rule on the whole sequence, of which each device holds a shard.

    Args:
      form: how a device computes its shard, `delta_chunks` or `delta_batched`.
      inputs: the device's shard.
      state_BHVK: the state before the whole sequence, the same on all devices that share it.
      clip: as in `delta_rule`.

    Returns:
      The outputs of the shard, the state after the whole sequence, and the number of its tokens
      whose write was clipped.
    """
    N = inputs.k.shape[1]
    plan, inputs = form.cut(inputs, clip)
    result = _split(form, plan, inputs, state_BHVK)
    return result._replace(o_BNHV=result.o_BNHV[:, :N])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _split(form: Form, plan: Any, inputs: DeltaInputs, first_BHVK: jax.Array) -> DeltaResult:
    return _forward(form, plan, inputs, first_BHVK)[0]


def _forward(
    form: Form, plan: Any, inputs: DeltaInputs, first_BHVK: jax.Array
) -> tuple[DeltaResult, _Saved]:
    transition_BHKK, written_BHVK = form.affine_map(plan, inputs)
    run = functools.partial(form.forward, plan, inputs)

    def exact() -> tuple[DeltaResult, Any]:
        return run(_pass_along(lambda state: run(state)[0].state_BHVK, first_BHVK))

    assumed = run(_compose(first_BHVK, transition_BHKK, written_BHVK))
    clipped = _any_device(assumed[1].clipped)
    result, residuals = jax.lax.cond(clipped, exact, lambda: assumed)
    result = result._replace(
        state_BHVK=_broadcast_from(jax.lax.axis_size(SEQUENCE) - 1, result.state_BHVK),
        clipped_BH=jax.lax.psum(result.clipped_BH, SEQUENCE),
    )
    return result, _Saved(residuals, transition_BHKK, clipped)


def _backward(
    form: Form, plan: Any, saved: _Saved, cotangents: DeltaResult
) -> tuple[DeltaInputs, jax.Array]:
    dlast_BHVK = cotangents.state_BHVK

    def run(dstate_BHVK: jax.Array) -> tuple[DeltaInputs, jax.Array]:
        return form.backward(plan, saved.residuals, cotangents._replace(state_BHVK=dstate_BHVK))

    def exact() -> jax.Array:
        return _pass_along(lambda dstate: run(dstate)[1], dlast_BHVK, reverse=True)

    def composed() -> jax.Array:
        read_BHVK = run(jnp.zeros_like(saved.residuals.states[0]))[1]
        return _compose(dlast_BHVK, saved.transition_BHKK.mT, read_BHVK, reverse=True)

    dinputs, dstate_BHVK = run(jax.lax.cond(saved.clipped, exact, composed))
    return dinputs, _broadcast_from(0, dstate_BHVK)


_split.defvjp(_forward, _backward)


def _compose(
    first: jax.Array, factor: jax.Array, offset: jax.Array, reverse: bool = False
) -> jax.Array:
    """This device's initial state, by an affine map x -> x factor + offset on each device.

    The first device starts from `first`, the last one if `reverse`.
    """
    factors, offsets = jax.lax.all_gather((factor, offset), SEQUENCE)

    def step(x: jax.Array, at: _Pair) -> _Pair:
        return dot(x, at[0]) + at[1], x

    _, starts = jax.lax.scan(step, _varying(first), (factors, offsets), reverse=reverse)
    return starts[jax.lax.axis_index(SEQUENCE)]


def _pass_along(
    run: Callable[[jax.Array], jax.Array], first: jax.Array, reverse: bool = False
) -> jax.Array:
    """This device's initial state, where each device in turn sends `run(x)` to the next.

    The first device starts from `first`, the last one if `reverse`.
    """
    size, index = jax.lax.axis_size(SEQUENCE), jax.lax.axis_index(SEQUENCE)
    order = size - 1 - index if reverse else index
    shift = -1 if reverse else 1
    ring = [(i, (i + shift) % size) for i in range(size)]

    def turn(x: jax.Array, turn: jax.Array) -> tuple[jax.Array, None]:
        sent = jax.lax.cond(order == turn, run, lambda x: x, x)
        received = jax.lax.ppermute(sent, SEQUENCE, ring)
        return jnp.where(order == turn + 1, received, x), None

    return jax.lax.scan(turn, _varying(first), jnp.arange(size - 1))[0]


def _any_device(clipped: jax.Array | None) -> jax.Array:
    if clipped is None:
        return jnp.zeros((), bool)
    axes = jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.psum(jnp.any(clipped).astype(jnp.int32), axes) > 0


def _broadcast_from(index: int, x: jax.Array) -> jax.Array:
    is_source = jax.lax.axis_index(SEQUENCE) == index
    return jax.lax.psum(jnp.where(is_source, x, 0), SEQUENCE)


def _varying(x: jax.Array) -> jax.Array:
    return jax.lax.pcast(x, SEQUENCE, to="varying")
