"""The checks of `tools/sanity.py`: what each one found, what it needs, and why.

Every function returns `Check`s. Thresholds are where they are because of what they say in `why`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.generate.restore import Trained
from spectral_pod.layers.parameter import groups
from spectral_pod.models import chunks
from spectral_pod.models.model import abstract_params
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.shapes import PAD
from spectral_pod.train.probe_plots import Probes, layer_of, named, series
from spectral_pod.train.step import forward

MEMORISED = 0.1  # of the loss of the label frequencies
DEVIATIONS = 3.0  # standard errors, by which the model is better on held-out examples
ROUNDING = 2.0**-9  # of bfloat16, relative
UNCHANGED = 2.0**-24  # of float32, relative
GROWTH = 2.0**8  # of the residual stream: what a block adds to its input is then lost in bfloat16
SAME = 1e-4  # of the largest logit; FFTs in float32 spread errors of about 1e-6 of it
GRADIENT = 0.01  # relative error of a finite difference

_ROWS = 32  # held-out examples at a time


class Check(NamedTuple):
    """One check.

    Attributes:
      name: what is checked.
      sound: whether it is as it should be.
      found: what was found.
      why: what it needs, and why it needs that.
    """

    name: str
    sound: bool
    found: str
    why: str

    def line(self) -> str:
        return f"{'sound  ' if self.sound else 'UNSOUND'}  {self.name}: {self.found}"


# ---- learning


def memorised(loss: float, trivial: float, examples: int) -> Check:
    """Whether examples were learned by heart.

    Args:
      loss: on these examples after training, nats a label.
      trivial: the loss of the frequencies of their labels.
    """
    limit = MEMORISED * trivial
    return Check(
        f"memorises {examples} examples",
        bool(loss <= limit),
        f"loss {loss:.4f} nats a label; their frequencies have {trivial:.4f}",
        f"at most {limit:.4f}, {MEMORISED:.0%} of that: a sound model has parameters enough to "
        "tell all examples apart. One that does not has lost inputs, gradients or updates; or "
        "--steps are too few",
    )


def learns(better_N: np.ndarray) -> Check:
    """Whether labels follow from inputs.

    Args:
      better_N: by how many nats a label the model is better than the frequencies of the training
        labels, on each of N held-out examples.
    """
    mean = float(np.mean(better_N))
    error = float(np.std(better_N, ddof=1)) / math.sqrt(len(better_N))
    return Check(
        "labels follow from inputs",
        bool(mean > DEVIATIONS * error),
        f"{mean:.4f} +- {error:.4f} nats a label better than label frequencies, on "
        f"{len(better_N)} held-out examples",
        f"better by {DEVIATIONS:g} standard errors: no model is, if the labels are those of other "
        "examples: shuffled labels can be memorised, but not predicted. A hard task may need more "
        "--steps",
    )


# ---- gradients, updates, activations and gates, from the probes of a training


def finite(history: Probes) -> Check:
    """Whether all that was probed is finite."""
    bad = {
        f"{name} at step {step}"
        for step, found in history.items()
        for name, x in found.items()
        if not np.isfinite(x).all()
    }
    return Check(
        "finite", not bad, _some(bad) or f"all of {len(history)} probes", "no NaN, no infinity"
    )


def reached(history: Probes) -> Check:
    """Whether every layer adds something to the residual stream, and gets gradients."""
    dead = []
    for name in named(history, r"layer_\d+/\w+_rms"):
        _, added = series(history, name)
        _, stream = series(history, f"layer_{layer_of(name)}/rms")
        share = float(np.max(added / np.maximum(stream, 1e-30)))
        if share < ROUNDING:
            dead.append(f"{name.removesuffix('_rms')} adds {share:.1e} of the residual stream")
    silent = []
    for name in named(history, r"[^/]+/grad_norm/\w+"):
        _, norm = series(history, name)
        if not np.max(norm) > 0:
            layer, _, group = name.split("/")
            silent.append(f"{layer} has no gradient for its {group} parameters")
    return Check(
        "every layer takes part",
        not dead and not silent,
        _some([*dead, *silent]) or "all add to the stream and get gradients",
        f"once in the run at least {ROUNDING:.3g} of the stream, the rounding of bfloat16, below "
        "which an addition changes nothing; and a gradient above 0 in every layer and group",
    )


def moved(history: Probes) -> Check:
    """Whether every optimizer group of every layer is updated."""
    frozen = []
    for name in named(history, r"[^/]+/update_norm/\w+"):
        _, update = series(history, name)
        _, size = series(history, name.replace("/update_norm/", "/param_norm/"))
        share = float(np.max(update / np.maximum(size, 1e-30)))
        if share <= UNCHANGED:
            layer, _, group = name.split("/")
            frozen.append(f"the {group} parameters of {layer} move by {share:.1e} of their size")
    return Check(
        "every group is trained",
        not frozen,
        _some(frozen) or "all parameters move",
        f"once in the run more than {UNCHANGED:.1e} of their size, the rounding of float32, below "
        "which an update changes nothing",
    )


def bounded(history: Probes) -> list[Check]:
    """Whether gates and decays are what they are by definition, and activations keep their size."""
    out = []
    kinds = r"(energy_gate_mean|gate_mean|beta_mean|clip_share|decay|convolution_share|band_share)"
    for name in named(history, rf"layer_\d+/.*{kinds}"):
        _, values = series(history, name)
        low, high = float(np.min(values)), float(np.max(values))
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            out.append(f"{name} is from {low:.3g} to {high:.3g}")
    grown = []
    _, start = series(history, "input_rms")
    for name in named(history, r"layer_\d+/rms"):
        _, stream = series(history, name)
        factor = float(np.max(stream / np.maximum(start, 1e-30)))
        if not factor <= GROWTH:
            grown.append(f"{name} is {factor:.3g} times that of the input")
    return [
        Check(
            "gates and decays",
            not out,
            _some(out) or "all in [0, 1]",
            "in [0, 1], by their definition: a gate above 1 amplifies, a decay above 1 diverges",
        ),
        Check(
            "activations",
            not grown,
            _some(grown) or "their size is kept from layer to layer",
            f"at most {GROWTH:g} times that of the input: in bfloat16, what a block adds of the "
            "size of its input would be lost",
        ),
    ]


# ---- the trained model


def gradients(trained: Trained, batch: Mapping[str, Any]) -> Check:
    """Whether gradients are those of the loss: each optimizer group, by finite differences.

    In float32, as layers compute norms, memories and filters in float32 whatever the dtype. The
    direction has the sign of the gradient and random sizes, so that the change of the loss is the
    sum of all parameters' parts, far above rounding: it is made 2% of the loss, or less where
    parameters would change by more than a tenth. Central differences of two steps, one half of the
    other, are extrapolated (Richardson), which leaves an error of fourth order.
    """
    module, objective = trained.module, trained.objective
    batch = {name: jnp.asarray(x) for name, x in batch.items()}

    @jax.jit
    def losses(params: Any) -> jax.Array:
        outputs, _, _ = forward(params, batch, module, objective)
        return jnp.where(outputs["mask"], outputs["loss"], 0.0)

    def total(params: Any) -> float:  # rounding errors of labels average out in float64
        return float(np.sum(np.asarray(losses(params), np.float64)))

    found = {}
    with on_mesh(trained.mesh):
        params = jax.tree.map(jnp.asarray, trained.params)
        value, grads = total(params), jax.grad(lambda p: jnp.sum(losses(p)))(params)
        boxed = abstract_params(module, trained.mesh)
        for group in sorted(set(jax.tree.leaves(groups(boxed))) - {"statistics"}):
            direction = _direction(params, grads, groups(boxed), group)
            expected = float(sum(jax.tree.leaves(jax.tree.map(_dot, grads, direction))))
            if expected <= 0:
                continue  # no gradient at all, which another check says
            size = min(0.02 * value / expected, 0.1)
            first, second = (_difference(total, params, direction, h) for h in (size, size / 2))
            found[group] = abs((4 * second - first) / 3 / expected - 1)
    worst = max(found, key=lambda group: found[group], default="")
    return Check(
        "gradients",
        bool(found) and all(error <= GRADIENT for error in found.values()),
        f"{worst}: {found[worst]:.1e} off a finite difference, the most of {len(found)} groups"
        if found
        else "there are none",
        f"at most {GRADIENT:g} of the derivative, in float32: rounding leaves 1e-3 or less, and a "
        "missing or doubled term some tenths",
    )


def causality(trained: Trained, tokens_BL: np.ndarray) -> Check:
    """Whether later bytes change earlier logits of a causal model."""
    rng = np.random.default_rng(0)
    length = tokens_BL.shape[1]
    before, after = 0.0, math.inf
    logits = _logits_of(trained)
    whole = logits(tokens_BL)
    scale = float(np.max(np.abs(whole)))
    for place in (length // 3, 2 * length // 3):
        others = rng.integers(0, 256, tokens_BL.shape, np.int32)
        is_later = (np.arange(length) > place)[None] & (tokens_BL != PAD)
        changed = logits(np.where(is_later, others, tokens_BL))
        difference_BL = np.max(np.abs(changed - whole), axis=2) / scale
        before = max(before, float(np.max(difference_BL[:, : place + 1])))
        after = min(after, float(np.max(difference_BL[:, place + 1 :])))
    return Check(
        "causality",
        before <= SAME and after > SAME,
        f"other later bytes change earlier logits by {before:.1e} of the largest, and later ones "
        f"by {after:.1e}",
        f"earlier ones by at most {SAME:g}, as FFTs spread rounding errors of 1e-6; later ones by "
        "more, or the bytes have no effect",
    )


def padding(trained: Trained, tokens_BL: np.ndarray) -> Check:
    """Whether padding changes the logits of an encoder: more of it, or other bytes in it."""
    config = trained.module.config
    documents, length = config.documents, tokens_BL.shape[1] // config.documents
    half = max(config.stride, length // 2 // config.stride * config.stride)
    kept = max(1, half - config.stride // 2)  # the last patch is partly padding
    parts = tokens_BL.reshape(-1, documents, length)
    short = np.where(np.arange(half) < kept, parts[..., :half], PAD)
    long = np.full_like(parts, PAD)
    long[..., :half] = short
    noise = np.random.default_rng(0).integers(0, 256, long.shape, np.int32)
    filled = np.where(long == PAD, noise, long)
    rows = len(parts)
    mask = (long != PAD).reshape(rows, -1)
    logits = _logits_of(trained)
    expected = logits(short.reshape(rows, -1))
    found = {
        "more padding": logits(long.reshape(rows, -1)),
        "other bytes in it": logits(filled.reshape(rows, -1), mask),
    }
    if not trained.module.pools:
        expected, found = expected[:, :kept], {name: x[:, :kept] for name, x in found.items()}
    scale = float(np.max(np.abs(expected)))
    change = {name: float(np.max(np.abs(x - expected))) / scale for name, x in found.items()}
    return Check(
        "padding",
        max(change.values()) <= SAME,
        ", ".join(f"{name}: {x:.1e}" for name, x in change.items()) + " of the largest logit",
        f"at most {SAME:g}: padding is no input, and FFTs spread rounding errors of 1e-6",
    )


def held_out(
    trained: Trained, examples: Mapping[str, np.ndarray], frequencies_C: np.ndarray
) -> np.ndarray:
    """By how many nats a label a model is better than label frequencies, for each example."""
    apply = jax.jit(
        lambda params, batch: forward(params, batch, trained.module, trained.objective)[0]
    )
    better = []
    with on_mesh(trained.mesh):
        for start in range(0, len(examples["tokens"]), _ROWS):
            batch = {name: x[start : start + _ROWS] for name, x in examples.items()}
            outputs = jax.device_get(apply(trained.params, batch))
            rows = len(batch["tokens"])
            valid_BL = np.asarray(outputs["mask"]).reshape(rows, -1)
            trivial_BL = -np.log(frequencies_C[batch["labels"]]).reshape(rows, -1)
            gain_BL = (trivial_BL - np.asarray(outputs["loss"]).reshape(rows, -1)) * valid_BL
            count_B = valid_BL.sum(axis=1)
            better.append((gain_BL.sum(axis=1) / np.maximum(count_B, 1))[count_B > 0])
    return np.concatenate(better)


def label_frequencies(batches: Sequence[Mapping[str, Any]], num_classes: int) -> np.ndarray:
    """The share of each class among valid labels, each class counted once more; float64 [C]."""
    counts = np.ones(num_classes)
    for batch in batches:
        counts += np.bincount(batch["labels"][batch["valid"]], minlength=num_classes)
    return counts / counts.sum()


def _logits_of(trained: Trained) -> Callable[..., np.ndarray]:
    """A function from tokens, and if they are not those of PAD their mask, to logits, float64."""

    @jax.jit
    def apply(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return chunks.logits(trained.module, {"params": params}, tokens, mask)

    def logits(tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        mask = tokens != PAD if mask is None else mask
        with on_mesh(trained.mesh):
            return np.asarray(apply(trained.params, tokens, mask), np.float64)

    return logits


def _direction(params: Any, grads: Any, group_of: Any, group: str) -> Any:
    """Changes of a group's parameters with the signs of their gradients and random sizes, each of
    the size of the array that it belongs to; zero for all others."""
    rng = np.random.default_rng(0)

    def one(kind: str, p: jax.Array, g: jax.Array) -> jax.Array:
        if kind != group:
            return jnp.zeros_like(p)
        size = max(float(jnp.sqrt(jnp.mean(jnp.square(p)))), 1e-3)
        sizes = np.abs(rng.normal(size=p.shape)).astype(np.float32)
        return jnp.sign(g) * jnp.asarray(sizes) * jnp.float32(size)

    return jax.tree.map(one, group_of, params, grads)


def _difference(loss: Callable[[Any], float], params: Any, direction: Any, size: float) -> float:
    """The central difference of a loss along a direction."""

    def at(step: float) -> float:
        moved = jax.tree.map(lambda p, d: p + jnp.float32(step) * d, params, direction)
        return loss(moved)

    return (at(size) - at(-size)) / (2 * size)


def _dot(a: jax.Array, b: jax.Array) -> float:
    return float(np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)))


def _some(found: Sequence[str] | set[str]) -> str:
    """The first of several findings, and how many others there are."""
    rows = sorted(found)
    more = f"; and {len(rows) - 3} more" if len(rows) > 3 else ""
    return "; ".join(rows[:3]) + more
