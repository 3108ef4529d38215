"""Probes within a training: what layers show of themselves, their gradients and their updates.

Every `train.probe_every_steps` steps, before the step, the run computes from its state and the next
batch what that step will do, without doing it:

    input_rms, layer_0/rms, layer_0/spectral/decay, ...   `layers/probes.py`
    layer_0/grad_norm/GROUP     Euclidean norm of the gradients of a layer's optimizer group, before
                                clipping; layers outside of the blocks have their own names
    layer_0/update_norm/GROUP   the same of what the optimizer adds to the parameters
    layer_0/param_norm/GROUP    the same of the parameters

The arrays are kept in WORKDIR/probes/STEP.npz. Of each, `probes/NAME` or its mean, least and
largest value are metrics, and `probe_plots.py` draws them over training. A probe takes about as
long as a step and a half (docs/results.md).
"""

import importlib.util
import io
import zipfile
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from spectral_pod import errors, storage
from spectral_pod.errors import UserError
from spectral_pod.layers.block import unstack
from spectral_pod.models.model import Model, probed
from spectral_pod.objectives import Objective
from spectral_pod.parallel import runtime
from spectral_pod.parallel.sharding import batch_sharding, replicated
from spectral_pod.shapes import PAD
from spectral_pod.train import probe_plots
from spectral_pod.train.optim import Optimizer
from spectral_pod.train.state import TrainState
from spectral_pod.train.step import Batch, micro_batches, next_update

if TYPE_CHECKING:
    from spectral_pod.config import Config

History = dict[int, dict[str, np.ndarray]]  # by step, the number of updates made before


class Prober:
    """The probes of a run.

    Attributes:
      history: the arrays of all probes of the run so far, on the leader.
    """

    def __init__(
        self,
        workdir: str,
        model: Model,
        optimizer: Optimizer,
        objective: type[Objective],
        config: "Config",
        mesh: Mesh,
        abstract: TrainState,
        step: int,
    ):
        """Continues the probes in the workdir from `step`.

        Raises:
          UserError: matplotlib is not installed.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError(
                f"config.train.probe_every_steps is {config.train.probe_every_steps}, and "
                "matplotlib, which draws the probes, is not installed; pip install "
                "'spectral-pod[plots]', or set the field to 0"
            )
        compute = partial(
            probe_step, model=model, optimizer=optimizer, objective=objective, config=config
        )
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        self._compute = jax.jit(
            compute,
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )
        self._folder = epath.Path(workdir) / "probes"
        self.history: History = {}
        if runtime.is_leader():
            self.history = {s: x for s, x in read_history(workdir).items() if s < step}

    def probe(self, step: int, state: TrainState, batch: Batch) -> dict[str, float]:
        """Probes a state of `step` steps with the batch of the next one; returns the metrics."""
        found: dict[str, np.ndarray] = jax.device_get(self._compute(state, batch))
        if runtime.is_leader():
            self.history[step] = found
            content = io.BytesIO()
            np.savez_compressed(content, **found)  # type: ignore[arg-type]
            with errors.naming(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            storage.write_whole(self._folder / f"{step:08}.npz", content.getvalue())
        return scalars(found)

    def pictures(self) -> dict[str, np.ndarray]:
        """All probes over training, as pictures by name; none where there is no probe yet."""
        figures = probe_plots.figures(self.history)
        return {f"probes/{name}": probe_plots.pixels(figure) for name, figure in figures.items()}


def read_history(workdir: str) -> History:
    """The probes that a workdir holds, by step; files that are damaged are logged and left out."""
    history = {}
    for file in sorted((epath.Path(workdir) / "probes").glob("*.npz")):
        try:
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
                history[int(file.stem)] = {name: arrays[name] for name in arrays.files}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            logging.error("%s is damaged, and its probe is left out: %s", file, error)
    return history


def probe_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    optimizer: Optimizer,
    objective: type[Objective],
    config: "Config",
) -> dict[str, jax.Array]:
    """What a step would do with a batch: float32 arrays by name, see the top of this file.

    Layers show themselves without dropout, on the first micro-batch.
    """
    update = next_update(
        state, batch, model=model, optimizer=optimizer, objective=objective, config=config
    )
    tokens_BL = micro_batches(config.train.grad_accumulation, batch["tokens"])[0]
    found = probed(model, {"params": state.params}, tokens_BL, tokens_BL != PAD)
    trees = {"grad_norm": update.grads, "update_norm": update.updates, "param_norm": state.params}
    for kind, tree in trees.items():
        for (layer, group), norm in norms_by_layer(tree, optimizer.groups).items():
            found[f"{layer}/{kind}/{group}"] = norm
    return found


def norms_by_layer(tree: Any, group_of: Any) -> dict[tuple[str, str], jax.Array]:
    """Euclidean norms, float32 [], by layer and optimizer group.

    Args:
      tree: parameters, gradients or updates, of which layers may be stacked.
      group_of: the optimizer group of every parameter.
    """

    def square(group: str, x: jax.Array) -> dict[str, jax.Array]:
        return {group: jnp.square(x.astype(jnp.float32))}

    squares: dict[tuple[str, str], jax.Array] = {}
    apart = unstack(jax.tree.map(square, group_of, tree))
    for path, x in jax.tree_util.tree_leaves_with_path(apart):
        where = path[0].key, path[-1].key
        if where[1] != "statistics":  # which are not trained
            squares[where] = squares.get(where, jnp.float32(0)) + jnp.sum(x)
    return {where: jnp.sqrt(total) for where, total in squares.items()}


def scalars(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The metrics of a probe: single numbers, and of arrays the mean, least and largest value."""
    values = {}
    for name, x in found.items():
        if x.ndim == 0:
            values[f"probes/{name}"] = float(x)
            continue
        for kind, reduce in (("mean", np.mean), ("min", np.min), ("max", np.max)):
            values[f"probes/{name}/{kind}"] = float(reduce(x))
    return values
