"""Measures every method of a configuration's operations on the device at hand, and prints the flags
that keep the fastest.

    python -m tools.tune --config=configs/lra_listops.py
    ... --output=FILE.json --repeats=9

The operations are the long convolutions, spectral filters, delta rules and attention that the model
calls in training, on arrays of the sizes that one device has of a batch: forward and backward, the
methods in turns, by the median of wall time. A method that takes twice as long as the fastest runs
once. The numbers are random, the keys of unit length, so that no write of a delta rule is clipped,
and all positions are valid. Nothing is chosen for later runs: give them the flags. No run reads
FILE.
"""

import argparse
import contextlib
import functools
import inspect
import json
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spectral_pod import models
from spectral_pod.config import Config, read_len
from spectral_pod.data import tasks
from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive
from spectral_pod.generate.restore import one_device
from spectral_pod.layers import attention, delta_memory
from spectral_pod.layers.architecture import ModelConfig
from spectral_pod.layers.spectral import SpectralLayer
from spectral_pod.models.model import abstract_params
from spectral_pod.ops import fft, long_conv
from spectral_pod.ops.choice import Choice
from spectral_pod.ops.kernels import NotServed
from spectral_pod.parallel import runtime
from spectral_pod.parallel.mesh import on_mesh
from spectral_pod.validation import validate, validate_mesh

from . import shell
from .bench import timing


class Operation(NamedTuple):
    """An operation with several methods, of which a field of the configuration names one."""

    name: str
    module: Any  # where the layers find it
    field: str
    methods: tuple[str, ...]


def _named(of: type, field: str) -> tuple[str, ...]:
    """The methods that a field can name, without "plain", a baseline that does not scale."""
    names = typing.get_args(typing.get_type_hints(of)[field])
    return tuple(name for name in names if name not in ("auto", "plain"))


OPERATIONS = (
    Operation("causal_conv", long_conv, "model.long_conv", _named(ModelConfig, "long_conv")),
    Operation("spectral_filter", fft, "model.spectral.method", _named(SpectralLayer, "method")),
    Operation(
        "delta_rule", delta_memory, "model.memory.method",
        _named(delta_memory.DeltaMemoryLayer, "method"),
    ),
    Operation(
        "attention", attention, "model.attention.method",
        _named(attention.AttentionLayer, "method"),
    ),
)  # fmt: skip


class Call(NamedTuple):
    """An operation and its arguments: arrays by shape and dtype, and other values."""

    operation: Operation
    arguments: tuple[tuple[str, Any], ...]

    @property
    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: x for name, x in self.arguments if isinstance(x, jax.ShapeDtypeStruct)}

    def __str__(self) -> str:
        first = next(iter(self.arrays.values()))
        return f"{self.operation.name} {first.dtype}[{','.join(map(str, first.shape))}]"


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("tune", __doc__)
    parser.add_config()
    parser.add_value("--repeats", Positive, 5, "of every method (5)")
    parser.add_output("--output", "write the measurements and the flags to this file as well")
    return shell.run(parser, tune, argv)


def tune(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    calls = called(arguments.config)
    if not calls:
        raise ConfigError("config.model has no operation that several methods compute")
    with on_mesh(one_device()):
        rows = measure(calls, arguments.repeats)
    flags = []
    print(f"{jax.devices()[0].device_kind}: milliseconds, forward and backward")
    for operation in dict.fromkeys(call.operation for call in calls):
        of_it = [row for row in rows if row["operation"] == operation.name]
        method = fastest(of_it)
        now = models.operations(arguments.config).get(operation.name)
        print("\n".join(_table(of_it, method, now)))
        flags.append(f"--config.{operation.field}={method}")
    print(f"\nTo keep the fastest: {' '.join(flags)}")
    if arguments.output:
        report = {
            "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "config": arguments.config_flags, "flags": flags, "rows": rows,
        }  # fmt: skip
        shell.write(arguments.output, json.dumps(report, indent=1) + "\n")


def called(config: Config) -> list[Call]:
    """The distinct calls of operations in a forward pass of one device's share of a batch.

    Raises:
      ConfigError: the configuration is invalid, or splits sequences or widths over devices.
    """
    validate(config)
    if config.mesh.sequence != 1 or config.mesh.tensor != 1:
        raise ConfigError(
            "config.mesh.sequence and config.mesh.tensor must be 1: operations are measured on one "
            "device, without what they would communicate"
        )
    sizes = validate_mesh(config, len(jax.devices()))
    shares = sizes["data"] * sizes["fsdp"] * config.train.grad_accumulation
    task = tasks.make(config.data.task, config.data.options)
    model = models.build(config, num_classes=task.num_classes, vocab_size=task.vocab_size)
    shape = max(1, config.train.global_batch_size // shares), read_len(config)
    found: list[Call] = []
    with on_mesh(one_device()), contextlib.ExitStack() as stack:
        params = nn.unbox(abstract_params(model, one_device()))
        for operation in OPERATIONS:
            recorder = _recorder(operation, found)
            stack.enter_context(mock.patch.object(operation.module, operation.name, recorder))
        tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
        jax.eval_shape(lambda p, *batch: model.apply({"params": p}, *batch), params, tokens, mask)
    return list(dict.fromkeys(found))


def _recorder(operation: Operation, found: list[Call]) -> Callable[..., Any]:
    """The operation itself, which appends every call to `found`."""
    function = getattr(operation.module, operation.name)

    @functools.wraps(function)
    def recorded(*arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(function).bind(*arguments, **options).arguments
        described = [
            (name, jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x)
            for name, x in bound.items()
            if name != "method"
        ]
        found.append(Call(operation, tuple(described)))
        return function(*arguments, **options)

    return recorded


def measure(calls: Sequence[Call], repeats: int) -> list[dict[str, Any]]:
    """A row for every call and method; `ms` is None if `why` says that it cannot be computed."""
    rows, groups = [], {}
    for i, call in enumerate(calls, 1):
        lowered, inputs = {}, {name: _numbers(name, x) for name, x in call.arrays.items()}
        for method in call.operation.methods:
            try:
                lowered[method] = _lowered(call, method, inputs)
            except (ValueError, NotServed) as error:
                rows.append(_row(call, method, ms=None, why=str(error)))
        build = functools.partial(_comparison, call, lowered)
        groups[f"{i}. {call}"] = call, timing.Group(f"{i}. {call}", 1, build)
    report = timing.measure(
        [group for _, group in groups.values()], repeats=repeats, clock="wall", only="",
        say=shell.say,
    )  # fmt: skip
    for one in report.rows:
        name, _, method = one.name.rpartition("/")
        rows.append(_row(groups[name][0], method, ms=one.ms, repeats=one.repeats))
    return rows


def _row(call: Call, method: str, **found: Any) -> dict[str, Any]:
    return {"operation": call.operation.name, "call": str(call), "method": method} | found


def _lowered(call: Call, method: str, inputs: dict[str, jax.Array]) -> Callable[[], Any]:
    """Lowers the forward and backward pass of a method; a call compiles it and returns its run.

    Raises:
      ValueError: the method does not support these sizes.
      NotServed: it is a kernel that does not support these sizes, or this device.
    """
    function = getattr(call.operation.module, call.operation.name)
    options = {name: x for name, x in call.arguments if name not in inputs}
    fixed = {name: x for name, x in inputs.items() if x.dtype == jnp.bool_}
    varied = {name: x for name, x in inputs.items() if name not in fixed}

    def run(*values: jax.Array) -> jax.Array:
        named = dict(zip(varied, values, strict=True))
        result = function(**named, **fixed, **options, method=method)
        return result[0] if isinstance(result, tuple) else result

    weights = _numbers("weights", jax.eval_shape(run, *varied.values()))
    arguments = weights, *varied.values()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotServed)
        lowered = jax.jit(timing.forward_backward(run)).lower(*arguments)
    return lambda: functools.partial(timing.timed, lowered.compile(), *arguments)


def _numbers(name: str, like: Any) -> jax.Array:
    """Random numbers for the argument of this name."""
    rng = np.random.default_rng(0)
    if like.dtype == jnp.bool_:
        return jnp.ones(like.shape, bool)
    x = rng.normal(size=like.shape)
    if name in ("q_BNHK", "k_BNHK"):
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
    if name == "beta_BNH":
        x = rng.uniform(size=like.shape)
    if name == "log_gate_BNH":
        x = -0.1 * rng.uniform(size=like.shape)
    return jnp.asarray(x, like.dtype)


def _comparison(call: Call, lowered: dict[str, Callable[[], Any]]) -> timing.Comparison:
    cases = [timing.Case(name, "", str(call), compile()) for name, compile in lowered.items()]
    return timing.Comparison(cases, contest=True)


def totals(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[float, str]]:
    """Milliseconds of all calls of an operation, for each method that computes all of them."""
    for method in dict.fromkeys(row["method"] for row in rows):
        times = [row["ms"] for row in rows if row["method"] == method]
        if None not in times:
            yield sum(times), method


def fastest(rows: Sequence[dict[str, Any]]) -> str:
    return min(totals(rows))[1]


def _table(rows: Sequence[dict[str, Any]], chosen: str, now: Choice | None) -> list[str]:
    """The rows of an operation, and why its method is chosen."""
    lines = [
        f"  {row['call']:<46}{row['method']:<14}"
        + (row["why"] if row["ms"] is None else f"{row['ms']:>10.2f}")
        for row in rows
    ]
    (best, _), *others = sorted(totals(rows))
    why = f"{others[0][0] / best:.2f} times as fast as {others[0][1]}" if others else "no other can"
    configured = f"; the configuration takes {now}" if now else ""
    return [*lines, f"  -> {chosen}: {why}{configured}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
