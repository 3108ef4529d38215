"""AdamW with two parameter groups, warm-up and cosine decay, and global-norm clipping; a guard
against steps that are bad.

`dynamics` (filters, energy gates, memory scales: what S4's recipes train apart) has its own peak
rate and no weight decay; `weights` is everything else, of which kernels and embeddings decay.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

# Last component of a parameter's path -> group membership. Layers keep to these names.
DYNAMICS = (
    "filter", "filter_0", "filter_1", "filter_out", "log_decay",
    "energy_slope", "energy_bias", "scale_memory", "ssm_lambda", "ssm_b", "ssm_log_step",
)  # fmt: skip
DECAYED = ("kernel", "embedding", "position_embedding")


def leaf_name(path: Any) -> str:
    """The name of a parameter, without the box or index a tree path may end in."""
    return next(str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))


def schedules(config: ml_collections.ConfigDict) -> dict[str, optax.Schedule]:
    """The learning rate of each group by step: linear warm-up, cosine decay to zero."""
    total, warmup = config.train.total_steps, config.optimizer.warmup_steps
    return {
        group: optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup, total - 1), total)
        for group, peak in (
            ("dynamics", config.optimizer.dynamics_learning_rate),
            ("weights", config.optimizer.learning_rate),
        )
    }


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """clip by global norm -> Adam -> decay and rate by group; guarded where the config says so."""
    adam = optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.scale_by_adam(config.optimizer.b1, config.optimizer.b2),
        _decay_and_rate_by_group(config.optimizer.weight_decay, schedules(config)),
    )
    return adam if config.train.on_bad_step == "stop" else guard(adam, config.train.spike_factor)


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


def _decay_and_rate_by_group(
    weight_decay: float, rates: dict[str, optax.Schedule]
) -> optax.GradientTransformation:
    """`-rate_group(count) (update + weight_decay param)`, the decay only for `DECAYED` names."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rate = {group: schedule(state.count) for group, schedule in rates.items()}

        def one(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
            name = leaf_name(path)
            decay = weight_decay if name in DECAYED else 0.0
            return -rate["dynamics" if name in DYNAMICS else "weights"] * (u + decay * p)

        updates = jax.tree_util.tree_map_with_path(one, updates, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)
