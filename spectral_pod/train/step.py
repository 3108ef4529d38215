"""The training and the evaluation step: pure functions, jitted once with shardings."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu.metrics import Collection
from flax import traverse_util
from jax.sharding import Mesh

from spectral_pod.models import chunks
from spectral_pod.models.model import Model
from spectral_pod.objectives import Objective
from spectral_pod.parallel.sharding import batch_sharding, constrain, replicated
from spectral_pod.seeds import random_key
from spectral_pod.shapes import PAD
from spectral_pod.train.optim import Optimizer, guard_state, norms
from spectral_pod.train.state import TrainState

if TYPE_CHECKING:
    from spectral_pod.config import Config

Batch = dict[str, jax.Array]


class Update(NamedTuple):
    """The update of a step, not yet made, and what it was computed from.

    Attributes:
      grads, updates: as the parameters.
      opt_state: the optimizer's state after it.
      outputs: the objective's outputs for the whole batch, with `auxiliary` losses [B] if any.
      layers: the scalars that layers have sown, by name.
      statistics: the new running averages.
      num_rows: float32, the number of rows with a valid label, at least 1.
    """

    grads: Any
    updates: Any
    opt_state: Any
    outputs: dict[str, jax.Array]
    layers: dict[str, jax.Array]
    statistics: Any
    num_rows: jax.Array


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    optimizer: Optimizer,
    objective: type[Objective],
    config: "Config",
) -> tuple[TrainState, tuple[Collection, dict[str, jax.Array]]]:
    """One optimizer step on the global batch.

    Returns the next state, the step's `training_metrics`, and scalars by name: norms of the
    gradients and of the updated parameters by group, learning rates, what layers sow into the
    collection `metrics`, and with a guard the number of bad steps in a row.
    """
    update = next_update(
        state, batch, model=model, optimizer=optimizer, objective=objective, config=config
    )
    opt_state, outputs = update.opt_state, update.outputs
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and rates
        rates = {group: rate(state.step) for group, rate in optimizer.schedules.items()}
    guard = guard_state(opt_state)
    params = optax.apply_updates(state.params, update.updates)
    params = _with_statistics(
        params, update.statistics, keep=None if guard is None else guard.bad > 0
    )
    # Of the new parameters: finite gradients can still end in an update that overflows.
    by_kind = {"grad_norm": update.grads, "param_norm": params}
    scalars = {
        f"{kind}/{group}": norm
        for kind, tree in by_kind.items()
        for group, norm in norms(tree, optimizer.groups).items()
    }
    scalars |= {
        f"learning_rate/{group}": jnp.asarray(rate, jnp.float32) for group, rate in rates.items()
    }
    scalars |= update.layers
    if guard is not None:
        scalars["bad_steps"] = guard.bad
    if "auxiliary" in outputs:
        scalars["auxiliary_loss"] = jnp.sum(outputs.pop("auxiliary")) / update.num_rows
    state = TrainState(state.step + 1, params, opt_state)
    averages = Collection.create(**objective.training_metrics).single_from_model_output(**outputs)
    return state, (averages, scalars)


def next_update(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    optimizer: Optimizer,
    objective: type[Objective],
    config: "Config",
) -> Update:
    """The gradients of the loss of the global batch, and the update that they lead to."""
    num_micro = config.train.grad_accumulation
    key = jax.random.fold_in(random_key(config.seed), state.step)
    # Normalised by the whole batch, so that the losses of micro-batches add up.
    total_valid, total_rows = _count(batch["valid"]), _count(_valid_rows(batch["valid"]))

    smoothing = config.train.label_smoothing

    def measured(outputs: dict[str, jax.Array], sown: Any, valid: jax.Array) -> Any:
        """The share of the batch's loss, and (outputs, scalars of layers, running averages)."""
        layers = _mean_by_name(sown.pop("metrics", {}))
        statistics = sown.pop("statistics", {})
        total = jnp.sum(jnp.where(valid, outputs["loss"], 0.0)) / total_valid
        if sown:
            auxiliary_B = sum(jax.tree.leaves(sown), jnp.zeros(len(valid), jnp.float32))
            outputs["auxiliary"] = jnp.where(_valid_rows(valid), auxiliary_B, 0.0)
            total += jnp.sum(outputs["auxiliary"]) / total_rows
        return total, (outputs, layers, statistics)

    def loss_fn(params: Any, micro: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        outputs, _, sown = forward(params, micro, model, objective, smoothing, train=True, key=key)
        return measured(outputs, sown, micro["valid"])

    def grads_of_chunks(params: Any, micro: Batch, key: jax.Array) -> tuple[Any, Any]:
        def loss_of_chunk(logits: Any, sown: Any, part: Any) -> Any:
            outputs = objective.outputs(logits, part["labels"], part["valid"], smoothing)
            # An auxiliary loss is one of whole rows: the mean over their chunks.
            share = model.config.chunk / micro["tokens"].shape[1]
            sown = dict(sown)
            if "losses" in sown:
                sown["losses"] = jax.tree.map(lambda x: x * share, sown["losses"])
            return measured(outputs, sown, part["valid"])

        rows = micro | {"mask": micro["tokens"] != PAD}
        grads, kept = chunks.truncated_gradients(model, params, rows, loss_of_chunk, key=key)
        outputs, *others = kept
        others = jax.tree.map(lambda x: jnp.mean(x, axis=0), others)
        return grads, (jax.tree.map(chunks.joined, outputs), *others)

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if model.config.chunk and model.config.truncate_gradients and not model.pools:
        grad_fn = grads_of_chunks
    if num_micro == 1:
        grads, (outputs, layers, statistics) = grad_fn(state.params, batch, key)
    else:

        def accumulate(grads: Any, micro_and_index: Any) -> tuple[Any, Any]:
            micro, index = micro_and_index
            more, kept = grad_fn(state.params, micro, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, grads, more), kept

        micros = (jax.tree.map(partial(micro_batches, num_micro), batch), jnp.arange(num_micro))
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, (outputs, layers, statistics) = jax.lax.scan(accumulate, zeros, micros)
        outputs, layers = jax.tree.map(_whole_batch, outputs), jax.tree.map(jnp.mean, layers)
        statistics = jax.tree.map(lambda x: jnp.mean(x, axis=0), statistics)

    loss = jnp.sum(jnp.where(batch["valid"], outputs["loss"], 0.0)) / total_valid
    with jax.numpy_dtype_promotion("standard"):  # optax mixes counts and rates
        tx = optax.with_extra_args_support(optimizer.tx)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=loss)
    return Update(grads, updates, opt_state, outputs, layers, statistics, total_rows)


def _with_statistics(params: Any, statistics: Any, keep: jax.Array | None) -> Any:
    """The parameters with those in `statistics` replaced, unless `keep`, after a bad step."""
    if not statistics:
        return params
    old, new = traverse_util.flatten_dict(params), traverse_util.flatten_dict(statistics)
    if keep is not None:
        new = {path: jnp.where(keep, old[path], x) for path, x in new.items()}
    return traverse_util.unflatten_dict(old | new)


def _mean_by_name(sown: Any) -> dict[str, jax.Array]:
    """The mean over layers of the scalars that layers have sown, by their names."""
    by_name: dict[str, list[jax.Array]] = {}
    for (*_, name, _), x in jax.tree_util.tree_leaves_with_path(sown):
        by_name.setdefault(name.key, []).append(x.ravel())
    return {name: jnp.mean(jnp.concatenate(parts)) for name, parts in by_name.items()}


def _valid_rows(valid: jax.Array) -> jax.Array:
    """The rows with a valid label, bool [B]; the others pad the batch."""
    return jnp.any(valid, axis=tuple(range(1, valid.ndim)))


def _count(valid: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1.0)


def micro_batches(num_micro: int, x: jax.Array) -> jax.Array:
    """[B, ...] to [A, B/A, ...], each device's rows spread over the micro-batches.

    Row b goes to micro-batch b mod A: every device keeps its own rows, nothing is communicated.
    """
    x = jnp.swapaxes(x.reshape(x.shape[0] // num_micro, num_micro, *x.shape[1:]), 0, 1)
    return constrain(x, None, "batch", *(None,) * (x.ndim - 2))


def _whole_batch(x: jax.Array) -> jax.Array:
    """[A, B/A, ...] to [B, ...]: undoes `micro_batches`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def forward(
    params: Any,
    batch: Batch,
    model: Model,
    objective: type[Objective],
    smoothing: float = 0.0,
    *,
    train: bool = False,
    key: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], jax.Array | None, Any]:
    """What the model makes of a batch, read in chunks if it is configured so.

    Returns:
      The objective's outputs; the logits, or None where those of all positions would be of several
      chunks; and what layers have sown.
    """
    tokens_BL, labels, valid = batch["tokens"], batch["labels"], batch["valid"]
    mask_BL, variables = tokens_BL != PAD, {"params": params}
    if not model.config.chunk:
        sown: Any = {}
        if train:
            logits, sown = model.apply(
                variables, tokens_BL, mask_BL, train=True, rngs={"dropout": key},
                mutable=chunks.SOWN,
            )  # fmt: skip
        else:
            logits = model.apply(variables, tokens_BL, mask_BL)
        return objective.outputs(logits, labels, valid, smoothing), logits, dict(sown)
    rows = {"tokens": tokens_BL, "mask": mask_BL}
    if not model.pools:
        rows |= {"labels": labels, "valid": valid}

    def of_chunk(output: Any, part: Any) -> Any:
        if model.pools:
            return output
        return objective.outputs(output, part["labels"], part["valid"], smoothing)

    found, sown = chunks.read(model, variables, rows, of_chunk, train=train, key=key)
    # One value a row or a layer, as of whole rows: the mean over chunks.
    sown = jax.tree.map(lambda x: jnp.mean(x, axis=0), dict(sown))
    if not model.pools:
        return jax.tree.map(chunks.joined, found), None, sown
    logits = model.apply(variables, found, method="pooled")
    return objective.outputs(logits, labels, valid, smoothing), logits, sown


def eval_step(params: Any, batch: Batch, *, model: Model, objective: type[Objective]) -> Collection:
    """The `evaluation_metrics` of one batch."""
    outputs, logits, _ = forward(params, batch, model, objective)
    return Collection.create(**objective.evaluation_metrics).single_from_model_output(
        **outputs, logits=logits, tokens=batch["tokens"], labels=batch["labels"]
    )


def jit_train_step(
    model: Model,
    optimizer: Optimizer,
    objective: type[Objective],
    config: "Config",
    mesh: Mesh,
    abstract: TrainState,
) -> Any:
    """`train_step` jitted for the mesh; donates the state."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(
        partial(train_step, model=model, optimizer=optimizer, objective=objective, config=config),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def jit_eval_step(
    model: Model, objective: type[Objective], mesh: Mesh, abstract: TrainState
) -> Callable[[Any, Batch], Collection]:
    """`eval_step` jitted for the mesh; its metrics are on every device."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract.params)
    return jax.jit(
        partial(eval_step, model=model, objective=objective),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def abstract_batch(
    batch_size: int, seq_len: int, mesh: Mesh, *, by_position: bool = False
) -> Batch:
    """The batch as `jax.ShapeDtypeStruct`s with their shardings; labels by row or by position."""
    labelled = (batch_size, seq_len) if by_position else (batch_size,)
    shapes = {
        "tokens": ((batch_size, seq_len), jnp.int32),
        "labels": (labelled, jnp.int32),
        "valid": (labelled, bool),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }
