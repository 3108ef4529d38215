"""AdamW with two parameter groups, warm-up and cosine decay, and global-norm clipping.

`dynamics` (filters, energy gates, memory scales: what S4's recipes train apart) has its own peak
rate and no weight decay; `weights` is everything else, of which kernels and embeddings decay.
"""

from typing import Any

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
    """clip by global norm -> Adam -> decay and rate by group."""
    return optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.scale_by_adam(config.optimizer.b1, config.optimizer.b2),
        _decay_and_rate_by_group(config.optimizer.weight_decay, schedules(config)),
    )


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
