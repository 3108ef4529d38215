"""Which parameters and FLOPs of a program are spectral, by the flow of data through its jaxpr.

Nothing is decided by a name. Values that no input of the program reaches are functions of
parameters alone; they make filters and sines. A *parameter* is spectral if such a function of it

- is an operand of a Fourier transform: a filter given by its taps, or what shapes these;
- meets data between a transform and its inverse: a filter given by its transfer function;
- is an operand of a sine, a cosine or a complex exponential, or a factor of one: a frequency, a
  decay with a frequency (the eigenvalue of a state space), a phase, an amplitude.

A *FLOP* is spectral if it belongs to a Fourier transform, to a product of what has been transformed
and not been transformed back, or to what is computed of parameters alone for these filters and
sines. FLOPs are those of `analysis/flops.py`, in the defining form of each operation: elementwise
operations do not count. Filters that no transform computes therefore have no spectral FLOPs: the
recurrence of a state space, wavelets by shifted sums, and convolutions over a few positions, whose
taps are no spectral parameters either. `analyzer_verdict.py` says whether a layer is a filter.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from spectral_pod.analysis.flops import equation_flops


@dataclasses.dataclass
class Share:
    """Parameters and FLOPs of one component, and how many of them are spectral."""

    params: int = 0
    spectral_params: int = 0
    flops: float = 0.0
    spectral_flops: float = 0.0


def shares(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, Share]:
    """The shares of `fn(params, *inputs)`, by component: before, in and after the layers.

    A component is a direct part of a model, such as 'encoder', or of one of its blocks, such as
    'layer_0/spectral'; FLOPs outside of all parts belong to 'model'.

    Args:
      fn: applies a model whose layers are modules of their own, not stacked.
      params: nested dictionaries of arrays, which may be abstract.
      inputs: arrays, which may be abstract: the data.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [tuple(key.key for key in path) for path, _ in leaves]
    flow = _Flow(jax.make_jaxpr(fn)(params, *inputs).jaxpr, len(leaves))
    found: dict[str, Share] = {}
    for scope, flops, spectral in flow.costs():
        if flops:
            share = found.setdefault(_component(scope, {path[0] for path in paths}), Share())
            share.flops += flops
            share.spectral_flops += flops if spectral else 0.0
    for i, (path, (_, leaf)) in enumerate(zip(paths, leaves)):
        share = found.setdefault("/".join(path[: 2 if _LAYER.fullmatch(path[0]) else 1]), Share())
        share.params += leaf.size
        share.spectral_params += leaf.size if flow.spectral_params >> i & 1 else 0
    first = next((i for i, name in enumerate(found) if _LAYER.match(name)), 0)
    before = set([*found][:first])

    def place(name: str) -> tuple[int, int]:
        if layer := _LAYER.match(name):
            return 1, int(layer[0].removeprefix("layer_"))
        return (0, 0) if name in before else (2, 0)

    return {name: found[name] for name in sorted(found, key=place)}


_LAYER = re.compile(r"layer_\d+")


def _component(scope: str, parts: set[str]) -> str:
    """The component of a scope such as 'SpectralModel/layer_0/spectral/...'."""
    modules = [name.partition(".")[0] for name in scope.split("/")]
    for i, name in enumerate(modules):
        if _LAYER.fullmatch(name):
            inner = [other for other in modules[i + 1 :] if other.isidentifier() and other != name]
            return f"{name}/{inner[0]}" if inner else name
        if name in parts or name in ("pooling", "scales", "comparison"):
            return name
    return "model"


@dataclasses.dataclass
class _Step:
    """An equation of the flat program; `weight` is how often it runs."""

    primitive: str
    inputs: list[int]
    outputs: list[int]
    scope: str
    flops: float


class _Flow:
    """The flat program, and what is known of its values, which are numbered.

    Attributes:
      spectral_params: a bit per parameter.
    """

    def __init__(self, jaxpr: Any, num_params: int):
        self.steps: list[_Step] = []
        self.is_complex: list[bool] = []
        arguments = [self._value(v.aval) for v in jaxpr.invars]
        self._flatten(jaxpr, arguments, "", 1.0)
        count = len(self.is_complex)

        self.is_data = np.zeros(count, bool)
        self.is_data[arguments[num_params:]] = True
        self._spread(self.is_data, lambda step, known: known)

        # Of values that are functions of parameters alone: of which, a bit each.
        self.params_of = [0] * count
        for i, value in enumerate(arguments[:num_params]):
            self.params_of[value] = 1 << i
        self._spread(self.params_of, lambda step, known: 0 if self._reads_data(step) else known)
        self.in_spectrum = np.zeros(count, bool)
        self._spread(
            self.in_spectrum,
            lambda step, known: (known or step.primitive == "fft") and self._makes_complex(step),
        )
        self.is_wave = np.zeros(count, bool)
        self._spread(
            self.is_wave,
            lambda step, known: (known or self._makes_wave(step)) and not self._reads_data(step),
        )
        self.makes_filter = np.zeros(count, bool)  # filters and sines, and what they are made of
        self.spectral_params = 0
        for step in self.steps:
            for value in self._filters(step):
                self.makes_filter[value] = True
                self.spectral_params |= self.params_of[value]
        changed = True
        while changed:
            changed = False
            for step in reversed(self.steps):
                if self.makes_filter[step.outputs].any():
                    new = [v for v in step.inputs if self.params_of[v] and not self.makes_filter[v]]
                    self.makes_filter[new] = True
                    changed = changed or bool(new)

    def costs(self) -> Iterable[tuple[str, float, bool]]:
        """(scope, FLOPs, whether they are spectral) of every equation."""
        for step in self.steps:
            spectral = step.primitive == "fft" or bool(
                self.in_spectrum[step.outputs].any() or self.makes_filter[step.outputs].any()
            )
            yield step.scope, step.flops, spectral

    def _filters(self, step: _Step) -> list[int]:
        """The inputs of an equation that are filters or sines, made of parameters alone."""
        own = [v for v in step.inputs if self.params_of[v]]
        meets_spectrum = any(self.in_spectrum[v] and self.is_data[v] for v in step.inputs)
        scales_wave = step.primitive in ("mul", "dot_general") and not self._reads_data(step)
        scales_wave = scales_wave and bool(self.is_wave[step.inputs].any())
        if step.primitive == "fft" or self._makes_wave(step) or meets_spectrum or scales_wave:
            return own
        return []

    def _reads_data(self, step: _Step) -> bool:
        return bool(self.is_data[step.inputs].any())

    def _makes_complex(self, step: _Step) -> bool:
        return any(self.is_complex[v] for v in step.outputs)

    def _makes_wave(self, step: _Step) -> bool:
        if step.primitive not in ("sin", "cos") and not (
            step.primitive in ("exp", "expm1") and self._makes_complex(step)
        ):
            return False
        return any(self.params_of[v] for v in step.inputs)

    def _spread(self, facts: Any, rule: Callable[[_Step, Any], Any]) -> None:
        """Adds to the facts on every output what the rule makes of those on the inputs."""
        changed = True
        while changed:  # loops take more than one turn
            changed = False
            for step in self.steps:
                known: Any = 0
                for value in step.inputs:
                    known |= int(facts[value])
                if known := rule(step, known):
                    for value in step.outputs:
                        if int(facts[value]) | known != int(facts[value]):
                            facts[value] |= known
                            changed = True

    # ---- Flattening

    def _value(self, aval: Any) -> int:
        self.is_complex.append(
            np.issubdtype(getattr(aval, "dtype", np.float32), np.complexfloating)
        )
        return len(self.is_complex) - 1

    def _flatten(self, jaxpr: Any, arguments: list[int], scope: str, weight: float) -> list[int]:
        """Adds the equations of a program; returns the values of its results."""
        values = dict(zip(jaxpr.invars, arguments, strict=True))

        def read(v: Any) -> int:
            if isinstance(v, Literal) or v not in values:  # a constant
                return self._value(v.aval)
            return values[v]

        for equation in jaxpr.eqns:
            inputs = [read(v) for v in equation.invars]
            outputs = [self._value(v.aval) for v in equation.outvars]
            values.update(zip(equation.outvars, outputs))
            inner = f"{scope}/{equation.source_info.name_stack}"
            self._add(equation, inputs, outputs, inner, weight)
        return [read(v) for v in jaxpr.outvars]

    def _add(
        self, equation: Any, inputs: list[int], outputs: list[int], scope: str, weight: float
    ) -> None:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            body, consts, carries = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
            arguments = [self._value(v.aval) for v in body.invars]
            self._copy(inputs, arguments)
            results = self._flatten(body, arguments, scope, weight * params["length"])
            self._copy(results[:carries], arguments[consts : consts + carries])
            self._copy(results, outputs)
        elif name == "cond":
            bodies = [branch.jaxpr for branch in params["branches"]]
            costs = [sum(map(equation_flops, body.eqns)) for body in bodies]
            for i, body in enumerate(bodies):
                taken = weight if i == int(np.argmin(costs)) else 0.0
                self._copy(self._flatten(body, inputs[1:], scope, taken), outputs)
        elif name != "pallas_call" and (called := _called(params)) is not None:
            self._copy(self._flatten(called, inputs, scope, weight), outputs)
        else:
            flops = weight * equation_flops(equation)
            self.steps.append(_Step(name, inputs, outputs, scope, flops))

    def _copy(self, inputs: list[int], outputs: list[int]) -> None:
        for x, y in zip(inputs, outputs, strict=True):
            self.steps.append(_Step("copy", [x], [y], "", 0.0))


def _called(params: Any) -> Any:
    """The program that an equation calls, if any."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            return getattr(params[key], "jaxpr", params[key])
    return None
