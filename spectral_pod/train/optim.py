"""Optimizers by name, with two learning rates, warm-up and cosine decay, global-norm clipping, a
guard against bad steps, and an average of the parameters.

Each parameter declares its group where it is created (`layers/parameter.py`): 'dynamics' has its
own peak learning rate and no weight decay; 'decayed' and 'undecayed' share the other rate;
'statistics' are left as they are.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spectral_pod.layers.parameter import Parameter, by_frequency, groups
from spectral_pod.models.model import Model, abstract_params
from spectral_pod.train import selection

if TYPE_CHECKING:
    from spectral_pod.config import Config, OptimizerConfig


class Optimizer(NamedTuple):
    """The optimizer of a model.

    Attributes:
      tx: the transformation of gradients to updates.
      groups: the group of every parameter, as a tree of names.
      schedules: learning rates by step, for 'dynamics' and for all other parameters, 'weights'.
    """

    tx: optax.GradientTransformation
    groups: Any
    schedules: dict[str, optax.Schedule]


def make_optimizer(config: "Config", model: Model, mesh: Mesh) -> Optimizer:
    """The optimizer of a configuration: clipping by global norm, `config.optimizer.name`, then
    weight decay and learning rate by group; guarded unless `config.train.on_bad_step` is 'stop';
    with an average of the parameters if `config.optimizer.average` says so. If fewer than all
    frequencies of filters are to be in use, they are selected (`selection.py`).

    Raises:
      ValueError: a parameter declares no group.
    """
    options = config.optimizer
    boxed, rates = abstract_params(model, mesh), schedules(config)
    group_of = groups(boxed)
    tx = optax.chain(
        optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity(),
        OPTIMIZERS[options.name](options, boxed),
        _decay_and_rate_by_group(options.weight_decay, rates, group_of),
    )
    selected = by_frequency(boxed) if options.frequencies < 1 else {}
    if selected:
        tx = selection.select(tx, selected, selection.Schedule.of(config))
    if config.train.on_bad_step != "stop":
        tx = guard(tx, config.train.spike_factor)
    if options.average:
        tx = averaged(tx, options.average, selected)
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
    """Shazeer and Stern 2018, with updates relative to the root mean square of a parameter."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _muon(options: "OptimizerConfig", boxed: Any) -> optax.GradientTransformation:
    """Jordan et al. 2024 for matrices, scaled to the root mean square of Adam's updates (Liu et al.
    2025); Adam for all other parameters."""

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
    return optax.chain(muon, optax.scale(-1.0))  # optax's muon returns descent steps


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
            if group == "statistics":
                return jnp.zeros_like(u)
            decay = weight_decay if group == "decayed" else 0.0
            return -rate["dynamics" if group == "dynamics" else "weights"] * (u + decay * p)

        updates = jax.tree.map(one, group_of, updates, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def norms(tree: Any, group_of: Any) -> dict[str, jax.Array]:
    """Euclidean norms of parameters or gradients, float32 [], by top-level module.

    Those of the optimizer group 'dynamics' are separate, under NAME.dynamics.

    Args:
      tree: parameters or gradients.
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
    """The state of `guard`, saved in checkpoints so that a resumed run makes the same decisions."""

    inner: Any
    loss: jax.Array  # float32 []: the running average of the losses of good steps; 0: none yet
    bad: jax.Array  # int32 []: the number of consecutive bad steps up to now


def guard(
    inner: optax.GradientTransformation, spike_factor: float
) -> optax.GradientTransformationExtraArgs:
    """Skips a step whose loss or update is not finite, or whose `loss` exceeds `spike_factor` times
    the running average (0: no limit): parameters and the state of `inner` stay as they are.
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


def guard_state(opt_state: Any) -> GuardState | None:
    """The state of `guard` within that of an optimizer, if it has one."""
    inner = opt_state.inner if isinstance(opt_state, AverageState) else opt_state
    return inner if isinstance(inner, GuardState) else None


# ---- Averages of parameters -----------------------------------------------------------------


class AverageState(NamedTuple):
    """The state of `averaged`."""

    inner: Any
    average: Any  # as the parameters
    updates: jax.Array  # int32 []: how many there were


def averaged(
    inner: optax.GradientTransformation, decay: float, selected: selection.Filters
) -> optax.GradientTransformation:
    """Also keeps an exponential average of the parameters after each update.

    At update t, from 0, its decay is min(decay, (1 + t) / (10 + t)), so that it soon forgets the
    initial parameters (as in TensorFlow's ExponentialMovingAverage). Where a frequency of the
    filters `selected` is out of use, the average is zero, too.
    """

    def init(params: Any) -> AverageState:
        copies = jax.tree.map(jnp.copy, params)  # the parameters themselves are donated
        return AverageState(inner.init(params), copies, jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: AverageState, params: Any = None, **extra: Any
    ) -> tuple[Any, AverageState]:
        tx = optax.with_extra_args_support(inner)
        updates, after = tx.update(updates, state.inner, params, **extra)
        count = state.updates.astype(jnp.float32)
        rate = jnp.minimum(decay, (1 + count) / (10 + count))
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(
            lambda old, new: old + (1 - rate) * (new - old), state.average, params
        )
        average = selection.with_zeros_of(average, params, selected)
        return updates, AverageState(after, average, optax.safe_increment(state.updates))

    return optax.GradientTransformationExtraArgs(init, update)


def evaluated(state: Any) -> Any:
    """The parameters of a training state that are evaluated and used: the average, if there is one.

    Args:
      state: a `TrainState`.
    """
    average = isinstance(state.opt_state, AverageState)
    return state.opt_state.average if average else state.params
