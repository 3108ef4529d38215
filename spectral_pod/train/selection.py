"""Selects which frequencies of spectral filters are in use, while they are trained.

A parameter with a logical axis "frequency" is a transfer function, one of the spectral and of the
selective mixer. At the end a share of its frequencies is in use, and the others are zero in all
channels. A frequency is in use by all channels of a layer or by none: what remains is then a
smaller array with one list of frequencies, and one shorter transform could serve all channels. With
a choice by channel each would have its own list, and no transform would be shorter.

Being out of use is nothing but being zero. So models know nothing of it, and the gradient of a
frequency that is out of use says what the loss would gain from it.

In all layers alike, as gradual pruning with regrowth has it (Liu et al. 2021, "Sparse Training via
Boosting Pruning Plasticity with Neuroregeneration"):

- how many are in use follows the cubic schedule of Zhu and Gupta (2017, "To Prune, or Not to
  Prune"), from all after the warm-up to the target at `selection_end`; nothing changes after that;
- those with the least use are dropped. The use of frequency k is the sum over the steps since the
  selection before of `(sum_d Re(conj(W[k, d]) dL/dW[k, d]))^2`, the squared change of the loss, to
  first order, if k were dropped (Molchanov et al. 2019, "Importance Estimation for Neural Network
  Pruning"). It vanishes where the filter, its inputs or their effect on the loss do;
- some more are dropped, and as many with the largest gradients, in the sum of their squares over
  the same steps, come into use from zero, or remain (Evci et al. 2020, "Rigging the Lottery").
  Their share of those in use falls from `selection_regrowth` to zero by a cosine.

The optimizer sees no gradient of what is out of use. All of this is a function of the optimizer's
state, of one number or two a frequency, which is equal on all devices; shapes never change.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from spectral_pod.errors import ConfigError

if TYPE_CHECKING:
    from spectral_pod.config import Config

Filters = Mapping[tuple[str, ...], tuple[int, ...]]  # of `layers.parameter.by_frequency`


class Schedule(NamedTuple):
    """When frequencies are selected, and how many.

    Attributes:
      share: of the frequencies of a filter that is in use in the end, at least one of them.
      first, last: numbers of updates, from 1: the selections are after `first`, up to `last`.
      every: updates from one selection to the next; the last is at `last`.
      regrowth: the share of those in use that is replaced, at first.
    """

    share: float
    first: int
    last: int
    every: int
    regrowth: float

    @classmethod
    def of(cls, config: "Config") -> "Schedule":
        """That of a configuration.

        Raises:
          ConfigError: its end is within the warm-up.
        """
        options, total = config.optimizer, config.train.total_steps
        first, last = min(options.warmup_steps, total - 1), int(options.selection_end * total)
        if last <= first:
            raise ConfigError(
                f"config.optimizer.selection_end is {options.selection_end}, update {last} of "
                f"{total}; frequencies are selected after the warm-up of {first}, so give a larger "
                "share, or a smaller config.optimizer.warmup_steps"
            )
        every = options.selection_every_steps
        return cls(options.frequencies, first, last, every, options.selection_regrowth)

    def due(self, update: jax.Array) -> jax.Array:
        """Whether frequencies are selected at an update, bool []."""
        on_time = (self.last - update) % self.every == 0
        return on_time & (update > self.first) & (update <= self.last)

    def counts(self, update: jax.Array, total: int) -> tuple[jax.Array, jax.Array]:
        """How many of `total` frequencies are in use after a selection, and how many of these come
        from the largest gradients; int32 [] each."""
        passed = (update - self.first).astype(jnp.float32) / jnp.float32(self.last - self.first)
        passed = jnp.clip(passed, 0.0, 1.0)
        final = max(1, round(self.share * total))
        in_use = jnp.round(jnp.float32(total - final) * (1 - passed) ** 3).astype(jnp.int32) + final
        share = jnp.float32(self.regrowth / 2) * (1 + jnp.cos(jnp.pi * passed))
        return in_use, jnp.round(share * in_use.astype(jnp.float32)).astype(jnp.int32)


class SelectionState(NamedTuple):
    """The state of `select`; of filters, arrays [..., F] in the tree of their parameters."""

    inner: Any
    updates: jax.Array  # int32 []: how many there were
    unused: Any  # bool
    use: Any  # float32, since the last selection
    gradient: Any  # float32, energy since the last selection


def select(
    inner: optax.GradientTransformation, filters: Filters, schedule: Schedule
) -> optax.GradientTransformation:
    """Updates parameters by `inner`, and sets frequencies that go out of use to zero.

    Args:
      inner: the optimizer, learning rates included.
      filters: the parameters whose frequencies are selected.
      schedule: when, and how many.
    """

    def init(params: Any) -> SelectionState:
        flat = traverse_util.flatten_dict(params)

        def zeros(dtype: Any) -> Any:
            found = {}
            for path, axes in filters.items():
                shape = (n for i, n in enumerate(flat[path].shape) if i not in axes)
                found[path] = jnp.zeros(tuple(shape), dtype)
            return traverse_util.unflatten_dict(found)

        count = jnp.zeros((), jnp.int32)
        return SelectionState(
            inner.init(params), count, zeros(bool), zeros(jnp.float32), zeros(jnp.float32)
        )

    def update(grads: Any, state: SelectionState, params: Any = None) -> Any:
        number = optax.safe_increment(state.updates)
        due = schedule.due(number)
        flat_grads, flat_params, before, use, gradient = map(
            traverse_util.flatten_dict, (grads, params, state.unused, state.use, state.gradient)
        )
        after = {}
        for path, axes in filters.items():
            g, w = flat_grads[path], flat_params[path]
            use[path] += jnp.square(jnp.sum(g * w, axes))
            gradient[path] += jnp.sum(jnp.square(g), axes)
            counts = schedule.counts(number, before[path].shape[-1])
            new = unused_after(use[path], gradient[path], before[path], *counts)
            after[path] = jnp.where(due, new, before[path])
            use[path], gradient[path] = (
                jnp.where(due, 0.0, x) for x in (use[path], gradient[path])
            )
            out = jnp.expand_dims(before[path], axes)
            flat_grads[path] = jnp.where(out, 0.0, g)
        masked = traverse_util.unflatten_dict(flat_grads)
        updates, inner_state = inner.update(masked, state.inner, params)
        flat = traverse_util.flatten_dict(updates)
        for path, axes in filters.items():
            # Momentum would move what was out of use; w - w is exactly zero.
            out = jnp.expand_dims(before[path] | after[path], axes)
            flat[path] = jnp.where(out, -flat_params[path], flat[path])
        trees = (traverse_util.unflatten_dict(x) for x in (after, use, gradient))
        return traverse_util.unflatten_dict(flat), SelectionState(inner_state, number, *trees)

    return optax.GradientTransformation(init, update)


def unused_after(
    use: jax.Array,
    gradient: jax.Array,
    unused: jax.Array,
    in_use: jax.Array,
    regrown: jax.Array,
) -> jax.Array:
    """The frequencies that a selection leaves out of use, bool [..., F]; of equal ones the lower
    are in use.

    Args:
      use, gradient: what is known of each, at least 0, float32 [..., F].
      unused: those that were out of use before.
      in_use, regrown: of `Schedule.counts`, int32 [].
    """
    kept = _rank(jnp.where(unused, -1.0, use)) < in_use - regrown
    grown = _rank(jnp.where(kept, -1.0, gradient)) < regrown
    return ~(kept | grown)


def with_zeros_of(tree: Any, params: Any, filters: Filters) -> Any:
    """An average of parameters with zeros for those frequencies that are out of use in `params`."""
    if not filters:
        return tree
    flat, now = traverse_util.flatten_dict(tree), traverse_util.flatten_dict(params)
    for path, axes in filters.items():
        is_used = jnp.any(now[path] != 0, axes, keepdims=True)
        flat[path] = jnp.where(is_used, flat[path], 0.0)
    return traverse_util.unflatten_dict(flat)


def _rank(x: jax.Array) -> jax.Array:
    """The number of larger entries along the last axis, and of equal ones before an entry."""
    return jnp.argsort(jnp.argsort(-x, axis=-1, stable=True), axis=-1, stable=True)
