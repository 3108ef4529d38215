"""Optimizers by name, with two learning rates, warm-up and cosine decay, global-norm clipping, and
a guard against steps that are bad.

Each parameter declares its group where it is made (`layers/parameter.py`): `dynamics` has its own
peak rate and no weight decay, `decayed` and `undecayed` share the other rate.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spectral_pod.layers.parameter import Parameter, groups
from spectral_pod.models.model import Model, abstract_params

if TYPE_CHECKING:
    from spectral_pod.config import Config, OptimizerConfig


class Optimizer(NamedTuple):
    """How a model is trained.

    Attributes:
      tx: from gradients to updates.
      groups: the group of every parameter, a tree of names.
      schedules: the learning rates by step, of 'dynamics' and of all other 'weights'.
    """

    tx: optax.GradientTransformation
    groups: Any
    schedules: dict[str, optax.Schedule]


def make_optimizer(config: "Config", model: Model, mesh: Mesh) -> Optimizer:
    """clip by global norm -> the optimizer of the config's name -> decay and rate by group; guarded
    where the config says so.

    Raises:
      ValueError: a parameter declares no group.
    """
    options = config.optimizer
    boxed, rates = abstract_params(model, mesh), schedules(config)
    group_of = groups(boxed)
    tx = optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        OPTIMIZERS[options.name](options, boxed),
        _decay_and_rate_by_group(options.weight_decay, rates, group_of),
    )
    if config.train.on_bad_step != "stop":
        tx = guard(tx, config.train.spike_factor)
    return Optimizer(tx, group_of, rates)


def schedules(config: "Config") -> dict[str, optax.Schedule]:
    """The learning rate of each group by step: linear warm-up, cosine decay to zero."""
    total, warmup = config.train.total_steps, config.optimizer.warmup_steps
    return {
        group: optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup, total - 1), total)
        for group, peak in (
            ("dynamics", config.optimizer.dynamics_learning_rate),
            ("weights", config.optimizer.learning_rate),
        )
    }


# ---- Optimizers, without weight decay and learning rates ------------------------------------


def _adamw(options: "OptimizerConfig", boxed: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(options.b1, options.b2)


def _lion(options: "OptimizerConfig", boxed: Any) -> optax.GradientTransformation:
    """Chen et al. 2023; its learning rate is usually a third to a tenth of Adam's."""
    return optax.scale_by_lion(options.b1, options.b2)


def _adafactor(options: "OptimizerConfig", boxed: Any) -> optax.GradientTransformation:
    """Shazeer and Stern 2018, with updates relative to the size of a parameter."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _muon(options: "OptimizerConfig", boxed: Any) -> optax.GradientTransformation:
    """Jordan et al. 2024 for matrices, at the root mean square of Adam's updates (Liu et al. 2025),
    which counts for all other parameters."""

    def dimensions(box: Parameter) -> optax.contrib.MuonDimensionNumbers | None:
        if not box.inputs or "class" in box.names:
            return None
        axes = [i for i, name in enumerate(box.names) if name != "layer"]
        return optax.contrib.MuonDimensionNumbers(axes[: box.inputs], axes[box.inputs :])

    muon = optax.contrib.muon(
        1.0,
        adam_b1=options.b1,
        adam_b2=options.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=jax.tree.map(
            dimensions, boxed, is_leaf=lambda x: isinstance(x, Parameter)
        ),
    )
    return optax.chain(muon, optax.scale(-1.0))  # which is a descent already


OPTIMIZERS: dict[str, Callable[["OptimizerConfig", Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
}


def _decay_and_rate_by_group(
    weight_decay: float, rates: dict[str, optax.Schedule], group_of: Any
) -> optax.GradientTransformation:
    """`-rate_group(count) (update + weight_decay param)`, the decay only for group 'decayed'."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rate = {group: schedule(state.count) for group, schedule in rates.items()}

        def one(group: str, u: jax.Array, p: jax.Array) -> jax.Array:
            decay = weight_decay if group == "decayed" else 0.0
            return -rate["dynamics" if group == "dynamics" else "weights"] * (u + decay * p)

        updates = jax.tree.map(one, group_of, updates, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def norms(tree: Any, group_of: Any) -> dict[str, jax.Array]:
    """The Euclidean norms of parameters or gradients, by top-level module, dynamics apart.

    Args:
      group_of: the optimizer group of every parameter.
    """
    squares: dict[str, jax.Array] = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), kind in zip(leaves, jax.tree.leaves(group_of), strict=True):
        total = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        group = str(path[0].key) + (".dynamics" if kind == "dynamics" else "")
        squares[group] = squares[group] + total if group in squares else total
    return {group: jnp.sqrt(total) for group, total in squares.items()}


# ---- Bad steps ------------------------------------------------------------------------------


class GuardState(NamedTuple):
    """Of `guard`; saved with the rest, so that a resumed run judges as an undisturbed one."""

    inner: Any
    loss: jax.Array  # float32 []: the average of sound losses, newer ones weigh more; 0: none yet
    bad: jax.Array  # int32 []: bad steps in a row, up to now


def guard(
    inner: optax.GradientTransformation, spike_factor: float
) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters and `inner` as they were in a step whose loss or update is not finite, or
    whose `loss` exceeds `spike_factor` times the average before (0: any finite loss will do).
    """

    def init(params: Any) -> GuardState:
        return GuardState(inner.init(params), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: GuardState, params: Any = None, *, loss: jax.Array, **_: Any
    ) -> tuple[Any, GuardState]:
        updates, after = inner.update(updates, state.inner, params)
        bad = ~jnp.isfinite(loss) | ~jnp.isfinite(optax.tree.norm(updates))
        if spike_factor:
            bad |= (state.loss > 0) & (loss > spike_factor * state.loss)
        average = jnp.where(state.loss > 0, 0.98 * state.loss + 0.02 * loss, loss)
        return jax.tree.map(lambda u: jnp.where(bad, 0, u), updates), GuardState(
            jax.tree.map(lambda old, new: jnp.where(bad, old, new), state.inner, after),
            jnp.where(bad, state.loss, average),
            jnp.where(bad, state.bad + 1, 0),
        )

    return optax.GradientTransformationExtraArgs(init, update)
