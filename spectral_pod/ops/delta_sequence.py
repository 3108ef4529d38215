"""The delta rule with the positions of a sequence split over devices.

Every function here runs on each device's own stretch of the tokens, under `shard_map`. Without
clips the state after a stretch is affine in the state before it, S' = S M + b, and the cotangents
are the other way round, dS = dS' M^T + c. A device finds its M [K, K] by writing zeros onto the
identity, and its b by writing its tokens onto nothing. It gathers those of all devices, which are
all that travels however long the sequence, and composes those before it to the state that its own
stretch starts from.

If a clip fires anywhere that state is void. Then, and only then, every device waits for the exact
state from the device before it. All devices of the mesh decide alike, so that none waits for a
collective that others don't take part in.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.ops import delta_chunks
from spectral_pod.ops.delta_chunks import Plan, Residuals
from spectral_pod.ops.delta_recurrence import Tokens, dot
from spectral_pod.parallel.sharding import SEQUENCE

_Pair = tuple[jax.Array, jax.Array]


class _Saved(NamedTuple):
    stretch: Residuals
    transition_BHKK: jax.Array  # M
    fired: jax.Array  # whether a clip fired anywhere


def delta_rule_split(tokens: Tokens, state_BHVK: jax.Array, clip: float | None = 10.0) -> _Pair:
    """`delta_rule_chunked` over the whole sequence, of which each device holds a stretch.

    Args:
      tokens: of the device's stretch.
      state_BHVK: before the whole sequence, the same on all devices along it.
      clip: as there.

    Returns:
      The reads o_BNHV of the stretch and the state_BHVK after the whole sequence.
    """
    N = tokens.k.shape[1]
    plan, tokens = delta_chunks.cut(tokens, clip)
    o_BNHV, state_BHVK = _split(plan, tokens, state_BHVK)
    return o_BNHV[:, :N], state_BHVK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split(plan: Plan, tokens: Tokens, first_BHVK: jax.Array) -> _Pair:
    return _forward(plan, tokens, first_BHVK)[0]


def _forward(plan: Plan, tokens: Tokens, first_BHVK: jax.Array) -> tuple[_Pair, _Saved]:
    transition_BHKK, written_BHVK = _summary(plan, tokens)
    run = functools.partial(delta_chunks.forward, plan, tokens)

    def exact() -> tuple[_Pair, Residuals]:
        return run(_hand_over(lambda state: run(state)[0][1], first_BHVK))

    assumed = run(_compose(first_BHVK, transition_BHKK, written_BHVK))
    fired = _anywhere(assumed[1].fired)
    (o_BNHV, state_BHVK), stretch = jax.lax.cond(fired, exact, lambda: assumed)
    last_BHVK = _from_device(jax.lax.axis_size(SEQUENCE) - 1, state_BHVK)
    return (o_BNHV, last_BHVK), _Saved(stretch, transition_BHKK, fired)


def _backward(plan: Plan, saved: _Saved, cotangents: _Pair) -> tuple[Tokens, jax.Array]:
    do_BNHV, dlast_BHVK = cotangents

    def run(dstate_BHVK: jax.Array) -> tuple[Tokens, jax.Array]:
        return delta_chunks.backward(plan, saved.stretch, (do_BNHV, dstate_BHVK))

    def exact() -> jax.Array:
        return _hand_over(lambda dstate: run(dstate)[1], dlast_BHVK, reverse=True)

    def composed() -> jax.Array:
        read_BHVK = run(jnp.zeros_like(saved.stretch.states[0]))[1]
        return _compose(dlast_BHVK, saved.transition_BHKK.mT, read_BHVK, reverse=True)

    dtokens, dstate_BHVK = run(jax.lax.cond(saved.fired, exact, composed))
    return dtokens, _from_device(0, dstate_BHVK)


_split.defvjp(_forward, _backward)


def _summary(plan: Plan, tokens: Tokens) -> _Pair:
    """M_BHKK and b_BHVK of the stretch: [v, 0] written onto [0; I]."""
    B, _, H, K = tokens.k.shape
    V = tokens.v.shape[-1]
    below_BHUK = jnp.broadcast_to(jnp.eye(V + K, K, -V), (B, H, V + K, K))
    everywhere = jax.sharding.get_abstract_mesh().axis_names
    below_BHUK = jax.lax.pcast(below_BHUK, everywhere, to="varying")
    padded = tokens._replace(v=jnp.pad(tokens.v, [(0, 0)] * 3 + [(0, K)]))
    (_, state_BHUK), _ = delta_chunks.forward(plan._replace(clip=None), padded, below_BHUK)
    return state_BHUK[..., V:, :], state_BHUK[..., :V, :]


def _compose(
    first: jax.Array, factor: jax.Array, offset: jax.Array, reverse: bool = False
) -> jax.Array:
    """What this device starts from, if the one at the start has `first` and each makes
    x factor + offset of its own x for the next."""
    factors, offsets = jax.lax.all_gather((factor, offset), SEQUENCE)

    def step(x: jax.Array, at: _Pair) -> _Pair:
        return dot(x, at[0]) + at[1], x

    _, starts = jax.lax.scan(step, _varying(first), (factors, offsets), reverse=reverse)
    return starts[jax.lax.axis_index(SEQUENCE)]


def _hand_over(
    run: Callable[[jax.Array], jax.Array], first: jax.Array, reverse: bool = False
) -> jax.Array:
    """What this device starts from, if the one at the start has `first` and each makes `run(x)`
    of its own x for the next: one device after another."""
    size, index = jax.lax.axis_size(SEQUENCE), jax.lax.axis_index(SEQUENCE)
    order = size - 1 - index if reverse else index
    shift = -1 if reverse else 1
    ring = [(i, (i + shift) % size) for i in range(size)]

    def turn(x: jax.Array, turn: jax.Array) -> tuple[jax.Array, None]:
        mine = jax.lax.cond(order == turn, run, lambda x: x, x)
        received = jax.lax.ppermute(mine, SEQUENCE, ring)
        return jnp.where(order == turn + 1, received, x), None

    return jax.lax.scan(turn, _varying(first), jnp.arange(size - 1))[0]


def _anywhere(fired: jax.Array | None) -> jax.Array:
    if fired is None:
        return jnp.zeros((), bool)
    axes = jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.psum(jnp.any(fired).astype(jnp.int32), axes) > 0


def _from_device(index: int, x: jax.Array) -> jax.Array:
    mine = jax.lax.axis_index(SEQUENCE) == index
    return jax.lax.psum(jnp.where(mine, x, 0), SEQUENCE)


def _varying(x: jax.Array) -> jax.Array:
    return jax.lax.pcast(x, SEQUENCE, to="varying")
