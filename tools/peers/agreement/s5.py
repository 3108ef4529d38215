"""Our S5 layer beside the published one, for its recipes."""

import contextlib
import importlib
import io
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod.layers.s5 import S5Layer
from tools import shell
from tools.peers.agreement.rows import Row, importable, load

ROUNDING = 1e-4  # of the largest entry: float32, in another order
SEEDS = 4  # initial states of each


def compare(folder: Path) -> Iterator[Row]:
    """Compares every recipe's initial state space, and one layer with equal parameters."""
    start, same = Row("S5", "initial Lambda, B, C, steps"), Row("S5", "output and gradients")
    scripts = sorted(folder.glob("bin/run_experiments/run_*.sh"))
    if not scripts:
        raise FileNotFoundError(f"{folder} has no recipes in bin/run_experiments")
    for script in scripts:
        recipe = script.stem.removeprefix("run_")
        shell.say(f"S5 {recipe}")
        blocks, theirs = _published_layer(folder, script)
        _compare_initial(recipe, blocks, theirs, start)
        difference = max(jax.tree.leaves(_differences(blocks, theirs)))
        same.add(recipe, difference, ROUNDING)
        start.cases, same.cases = start.cases + 1, same.cases + 1
    yield from (start, same)


def _compare_initial(recipe: str, blocks: int, theirs: Any, start: Row) -> None:
    ours = _our_layer(blocks, theirs)
    u_ND = jnp.zeros((2, theirs.H))
    keys = jax.random.split(jax.random.key(2), SEEDS)
    initial = [ours.init(key, u_ND[None], jnp.ones((1, 2), bool))["params"] for key in keys]
    made = [{name: box.value for name, box in params.items()} for params in initial]
    published = [_as_ours(theirs.init(key, u_ND)["params"], theirs.P) for key in keys]

    def draws(name: str) -> list[np.ndarray]:
        return [np.concatenate([np.ravel(p[name]) for p in params]) for params in (made, published)]

    (real, imaginary), expected = made[0]["ssm_lambda"], published[0]["ssm_lambda"]
    start.add(f"{recipe} Re Lambda", _difference(real, expected[0]), ROUNDING)
    # Theirs is the other of each conjugate pair.
    sorted_parts = np.sort(imaginary), np.sort(np.abs(expected[1]))
    start.add(f"{recipe} Im Lambda", _difference(*sorted_parts), ROUNDING)
    start.add_draws(f"{recipe} B", *draws("ssm_b"))
    start.add_draws(f"{recipe} steps", *draws("ssm_log_step"))
    start.add_draws(f"{recipe} C", *draws("readout"))


def _our_layer(blocks: int, theirs: Any) -> S5Layer:
    causal = not theirs.bidirectional
    return S5Layer(
        theirs.H,
        state_dim=theirs.P,
        blocks=blocks,
        causal=causal,
        c_init=theirs.C_init,
        dt_min=theirs.dt_min,
        dt_max=theirs.dt_max,
    )


def _published_layer(folder: Path, script: Path) -> tuple[int, Any]:
    """The number of blocks and the layer that the published program makes for a recipe.

    The program runs up to the point where it has made the initial state space.
    """
    flags = shlex.split(script.read_text().replace("\\\n", " "))[2:]
    datasets = {flag.partition("=")[2]: lambda *_, **__: [None] * 8 for flag in flags}
    names = ("wandb", "s5.train_helpers", "s5.seq_model")
    unused = {name: mock.MagicMock() for name in names}
    with contextlib.ExitStack() as stack:
        for patch in (
            importable({**unused, "s5.dataloading": SimpleNamespace(Datasets=datasets)}),
            mock.patch.object(sys, "path", [str(folder), *sys.path]),
            mock.patch.object(sys, "argv", ["run_train.py", *flags]),
            mock.patch.object(jnp, "DeviceArray", jax.Array, create=True),  # of older JAX
            contextlib.redirect_stdout(io.StringIO()),
        ):
            stack.enter_context(patch)
        program, layer = importlib.import_module("s5.train"), importlib.import_module("s5.ssm")
        train = mock.MagicMock(side_effect=program.train)
        made = mock.MagicMock(side_effect=_Reached)
        stack.enter_context(
            mock.patch.multiple(program, Datasets=datasets, train=train, init_S5SSM=made)
        )
        with contextlib.suppress(_Reached):
            load(folder / "run_train.py", name="__main__")
    return train.call_args.args[0].blocks, layer.S5SSM(**made.call_args.kwargs)


class _Reached(Exception):
    """The published program has come to the layer."""


def _as_ours(params: Mapping[str, jax.Array], P: int) -> dict[str, jax.Array]:
    """The parameters of the published layer, named and laid out as ours."""
    if "C" in params:
        readouts = [params["C"][:, i : i + P] for i in range(0, params["C"].shape[1], P)]
    else:
        readouts = [params["C1"], params["C2"]]
    names = ("readout", "readout_reverse")
    return {
        "ssm_lambda": jnp.stack([params["Lambda_re"], params["Lambda_im"]]),
        "ssm_b": jnp.transpose(params["B"], (1, 2, 0)),
        "ssm_log_step": params["log_step"][:, 0],
        "skip": params["D"],
        **{name: jnp.transpose(c, (2, 1, 0)) for name, c in zip(names, readouts)},
    }


def _differences(blocks: int, theirs: Any) -> Any:
    """Relative differences of the output and of the gradient of every parameter."""
    u_ND, weights_ND = jax.random.normal(jax.random.key(1), (2, 33, theirs.H))
    ours, mask_BN = _our_layer(blocks, theirs), jnp.ones((1, len(u_ND)), bool)
    params = theirs.init(jax.random.key(3), u_ND)["params"]

    def run_ours(params: Any) -> jax.Array:
        return ours.apply({"params": _as_ours(params, theirs.P)}, u_ND[None], mask_BN)[0]

    def run_theirs(params: Any) -> jax.Array:
        return theirs.apply({"params": params}, u_ND)

    def results(run: Callable[[Any], jax.Array], params: Any) -> Any:
        y_ND, vjp = jax.vjp(run, params)
        return y_ND, *vjp(weights_ND)

    return jax.tree.map(_difference, results(run_ours, params), results(run_theirs, params))


def _difference(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
