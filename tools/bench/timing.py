"""Interleaved timing: within a group every case runs once per round.

The load of the machine, clock rates and caches drift over seconds and minutes. Interleaved cases
share the drift, so the ratios of their medians are reproducible where their times are not.
"""

import dataclasses
import itertools
import re
import statistics
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from spectral_pod.errors import ConfigError

Clock = Literal["cpu", "wall"]

# In a contest a case this much slower than the fastest is dropped after its first run.
_DROPPED = 2.0


class Seconds(NamedTuple):
    """The time of one repetition. CPU time counts all threads of the process that ran it."""

    wall: float
    cpu: float


class Case(NamedTuple):
    """One case of a comparison."""

    name: str
    what: str
    shape: str
    run: Callable[[], Seconds]  # one repetition
    baseline: str = ""  # the case of its group that it is compared with
    temporaries: int | None = None  # bytes, as the compiler planned them
    work: Mapping[str, float] = types.MappingProxyType({})  # of a repetition, by unit


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured case: `ms` by the clock of the ratios, and the times by both clocks."""

    name: str  # GROUP/CASE
    what: str
    shape: str
    baseline: str
    speedup: float | None  # over the baseline
    repeats: int
    ms: float  # median
    ms_min: float
    wall_ms: float
    cpu_ms: float
    temporaries: int | None
    rates: dict[str, float]  # of work per second, by its unit


class Ratio(NamedTuple):
    """A named figure computed from the rows of a group, which are keyed by case."""

    name: str
    of: Callable[[Mapping[str, Row]], float]
    target: str = ""  # such as '>= 2.2'


class Comparison(NamedTuple):
    """Cases that are interleaved, and the ratios computed from them."""

    cases: Sequence[Case]
    ratios: Sequence[Ratio] = ()
    contest: bool = False  # only who is fastest matters


class Group(NamedTuple):
    """A comparison that is built, and takes memory, only when it runs."""

    name: str
    weight: float  # its share of the time of all groups
    build: Callable[[], Comparison]
    phase: int = 0  # several compilers build the groups of a phase before any of them is measured


class Report(NamedTuple):
    rows: list[Row]
    ratios: dict[str, float]
    targets: dict[str, str]


def times_faster(name: str, fast: str, slow: str, target: str = "") -> Ratio:
    """How many times as long `slow` takes as `fast`."""
    return Ratio(name, lambda rows: rows[slow].ms / rows[fast].ms, target)


def met(value: float, target: str) -> bool:
    """Whether a value meets its target, '>= x' or '<= x'."""
    relation, bound = target.split()
    return value >= float(bound) if relation == ">=" else value <= float(bound)


# ---- one repetition


def timed(fn: Callable[..., Any], *arguments: Any) -> Seconds:
    """Runs `fn` and waits for every array of its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(fn(*arguments))
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def compiled(fn: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Seconds], int]:
    """Compiles a function; returns one repetition of it, and its bytes of temporaries."""
    program = jax.jit(fn).lower(*arguments).compile()
    return lambda: timed(program, *arguments), temporaries(program)


def temporaries(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs besides its arguments and results."""
    analysis = program.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def forward_backward(fn: Callable[..., Any]) -> Callable[..., Any]:
    """(weights, *arguments) -> the weighted sum of `fn`'s results and its gradients.

    The sum is returned, or compilers would eliminate what only the results need; the weights are
    arguments, or compilers would fold them as constants.
    """

    def loss(arguments: tuple[Any, ...], weights: Any) -> jax.Array:
        products = jax.tree.map(lambda y, w: jnp.sum(y * w), fn(*arguments), weights)
        return sum(jax.tree.leaves(products), jnp.zeros(()))

    return lambda weights, *arguments: jax.value_and_grad(loss)(arguments, weights)


# ---- groups


def measure(
    groups: Sequence[Group], *, repeats: int, clock: Clock, only: str, say: Callable[[str], None],
    compilers: int = 1, keep: Callable[[Report], None] = lambda report: None,
) -> Report:  # fmt: skip
    """Runs the groups whose names match the regular expression `only`, in order.

    With several `compilers`, so many threads build all groups of a phase before the first of them
    is measured, as compilers too run programs on a device, to choose between them. The arrays of a
    phase must fit in memory together.

    `keep` is given what has been measured after every group, as a run may not come to its end.
    """
    groups = [group for group in groups if re.search(only, group.name)]
    if not groups:
        raise ConfigError(f"--filter={only} matches no group of this benchmark")
    report = Report([], {}, {})
    started, done = time.monotonic(), 0.0
    total = sum(group.weight for group in groups)
    phases = [list(phase) for _, phase in itertools.groupby(groups, lambda group: group.phase)]
    built = itertools.chain.from_iterable(_built(phase, compilers, say) for phase in phases)
    for i, (group, comparison) in enumerate(built, 1):
        rows, ratios = _measure(group, comparison, repeats, clock)
        report.rows.extend(rows.values())
        for ratio in ratios:
            report.ratios[ratio.name] = ratio.of(rows)
            if ratio.target:
                report.targets[ratio.name] = ratio.target
        done += group.weight
        left = int((time.monotonic() - started) * (total - done) / done)
        found = "".join(f"{name} {row.ms:.3g} ms, " for name, row in rows.items())
        place = f"{i} of {len(groups)} groups, ETA {left // 60}:{left % 60:02d}"
        say(f"{group.name}: {found}{place}")
        keep(report)
    return report


def _built(
    groups: Sequence[Group], compilers: int, say: Callable[[str], None]
) -> Iterator[tuple[Group, Comparison]]:
    """The groups with what they compare: built one by one, or all first by several threads."""
    if compilers == 1:
        for group in groups:
            yield group, group.build()
        return
    with ThreadPoolExecutor(compilers) as pool:
        ahead = {pool.submit(group.build): group for group in groups}
        for i, one in enumerate(as_completed(ahead), 1):
            one.result()
            say(f"{ahead[one].name} is compiled, {i} of {len(groups)}")
    for one in list(ahead):
        yield ahead.pop(one), one.result()


def _measure(
    group: Group, comparison: Comparison, repeats: int, clock: Clock
) -> tuple[dict[str, Row], Sequence[Ratio]]:
    cases, ratios, contest = comparison
    for case in cases:
        case.run()  # the first call allocates
    seconds: dict[str, list[Seconds]] = {case.name: [] for case in cases}
    remaining = list(cases)
    for _ in range(repeats):
        for case in remaining:
            seconds[case.name].append(case.run())
        if contest:
            best = min(getattr(seconds[case.name][0], clock) for case in remaining)
            remaining = [
                c for c in remaining if getattr(seconds[c.name][0], clock) < _DROPPED * best
            ]
    ms = {name: 1e3 * _median(runs, clock) for name, runs in seconds.items()}
    rows = {
        case.name: Row(
            name=f"{group.name}/{case.name}",
            what=case.what,
            shape=case.shape,
            baseline=case.baseline and f"{group.name}/{case.baseline}",
            speedup=ms[case.baseline] / ms[case.name] if case.baseline else None,
            repeats=len(seconds[case.name]),
            ms=ms[case.name],
            ms_min=1e3 * min(getattr(run, clock) for run in seconds[case.name]),
            wall_ms=1e3 * _median(seconds[case.name], "wall"),
            cpu_ms=1e3 * _median(seconds[case.name], "cpu"),
            temporaries=case.temporaries,
            rates={unit: 1e3 * work / ms[case.name] for unit, work in case.work.items()},
        )
        for case in cases
    }
    return rows, ratios


def _median(runs: Sequence[Seconds], clock: Clock) -> float:
    return statistics.median(getattr(run, clock) for run in runs)


# ---- text


def table(rows: Sequence[Row], clock: Clock) -> str:
    """The rows as text, one line each; times by `clock`."""
    head = ("case", "shape", f"{clock} ms", "min", "vs baseline", "temporaries", "rates", "what")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = (0, 1, len(head) - 1)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.shape,
        f"{row.ms:.2f}",
        f"{row.ms_min:.2f}",
        "" if row.speedup is None else f"{row.speedup:.2f} x",
        "" if row.temporaries is None else f"{row.temporaries / 2**20:.1f} MiB",
        ", ".join(f"{rate:,.0f} {unit}/s" for unit, rate in row.rates.items()),
        row.what,
    )


def ratio_lines(report: Report, verdicts: bool) -> str:
    """The ratios as text, with their targets and whether they are met if `verdicts`."""
    width = max((len(name) for name in report.ratios), default=0)
    lines = []
    for name, value in report.ratios.items():
        target = report.targets.get(name, "") if verdicts else ""
        verdict = f"  {target}: {'met' if met(value, target) else 'MISSED'}" if target else ""
        lines.append(f"{name.ljust(width)}  {value:8.4g}{verdict}")
    return "\n".join(lines)
