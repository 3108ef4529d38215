"""Profiles the training step of a configuration: speed and memory by length, and time by layer.

    python -m tools.profile --config=configs/lra_text.py:cpu --out=DIR
    python -m tools.profile --config=configs/lra_text.py:cpu --out=DIR \\
        --lengths=1024,4096,16384,65536 --against=attention

The step is that of the trainer, compiled and run on random bytes on the device at hand. --against
names changes of the configuration, as tools.ablate has them (tools/levers.py): each is measured
beside it, in turns, at every length, and the table says how many times as long it takes. Steps have
as many bytes at every length, at least one row. A variant whose step takes longer than
--limit_seconds is left out at greater lengths, and the table says so.

Milliseconds are medians of wall time; memory is what the compiler planned: parameters, optimizer
state, batch and temporaries. Time by layer is from a trace of XProf of the configuration's own
length: the time of operations on all threads or streams, without that of operations inside them;
DIR/trace is the trace, for TensorBoard. DIR also gets profile.json and, of several lengths,
lengths.png.
"""

import argparse
import collections
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from spectral_pod import command_line, storage
from spectral_pod import config as config_lib
from spectral_pod.analysis import hlo, provenance
from spectral_pod.data import tasks
from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive, PositiveFloat, parse
from spectral_pod.parallel import runtime
from spectral_pod.validation import validate

from . import levers, plots, shell, study
from .bench import step, timing

_TRACED = 3  # steps
_SHOWN = 12  # layers


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("profile", __doc__)
    parser.add_config()
    parser.add_place("--out", local=True, required=True, metavar="DIR", help="a folder")
    parser.add_argument("--lengths", metavar="N,N", help="bytes; default: that of the config")
    parser.add_argument("--against", default="", metavar="A,B", help="levers, as in tools.ablate")
    parser.add_value("--repeats", Positive, 5, "of each step (5)")
    parser.add_value("--limit_seconds", PositiveFloat, 60.0, "of a step (60)")
    return shell.run(parser, profile, argv)


class Measured(NamedTuple):
    """A variant at a length."""

    variant: str
    length: int
    rows: int
    milliseconds: float
    bytes_per_second: float
    memory_gb: float


def profile(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    flags = arguments.config_flags
    texts = (arguments.lengths or "").split(",")
    lengths = [parse(Positive, text, "--lengths") for text in texts if text]
    lengths = sorted(set(lengths)) or [arguments.config.data.seq_len]
    variants = [levers.BASE, *(name for name in arguments.against.split(",") if name)]
    configs = {
        (variant, length): _config(flags, variant, length)
        for length in lengths
        for variant in variants
    }
    os.makedirs(arguments.out, exist_ok=True)
    found: list[Measured] = []
    left_out: set[str] = set()
    for length in lengths:
        chosen = {v: configs[v, length] for v in variants if v not in left_out}
        measured = _measure(chosen, length, arguments.repeats)
        left_out |= {m.variant for m in measured if m.milliseconds > 1e3 * arguments.limit_seconds}
        found += measured
        place = f"{lengths.index(length) + 1} of {len(lengths)} lengths"
        shell.say(f"{length:,} bytes: {_said(measured)}; {place}")
    layers = by_layer(arguments.config, arguments.out)
    device = jax.devices()[0].device_kind
    tables = _table(found, variants, lengths), _layers_table(layers)
    print("\n\n".join((f"{device}, jax {jax.__version__}", *tables)))
    report = {
        "device": device, "jax": jax.__version__, "config": flags,
        "steps": [m._asdict() for m in found], "layers": layers,
    }  # fmt: skip
    out = epath.Path(arguments.out)
    storage.write_whole(out / "profile.json", json.dumps(report, indent=1) + "\n")
    if len(lengths) > 1 and (picture := _plot(found)):
        storage.write_whole(out / "lengths.png", picture)


def _config(flags: Sequence[str], variant: str, length: int) -> Any:
    """The configuration of a variant at a length.

    Raises:
      ConfigError: there is no such lever, or the configuration is invalid.
    """
    fields = levers.fields_of(variant, {}, "--against") | {"data.seq_len": str(length)}
    changed = [f"--config.{name}={value}" for name, value in fields.items()]
    given, config = (
        command_line.parse_trainer(["--workdir=unused", *flags, *more]).config.value
        for more in ([], changed)
    )
    size = given.train.global_batch_size * config_lib.row_len(given)
    config.train.global_batch_size = max(1, size // config_lib.row_len(config))
    validate(config)
    return config


def _measure(configs: Mapping[str, Any], length: int, repeats: int) -> list[Measured]:
    """Measures variants at a length, in turns."""
    steps = {variant: _build(config) for variant, config in configs.items()}
    cases = [timing.Case(v, "", "", built.run, work=built.work) for v, built in steps.items()]
    group = timing.Group(str(length), 1.0, lambda: timing.Comparison(cases))
    report = timing.measure([group], repeats=repeats, clock="wall", only="", say=lambda text: None)
    rows = {row.name.partition("/")[2]: row for row in report.rows}
    return [
        Measured(
            variant,
            length,
            configs[variant].train.global_batch_size,
            rows[variant].ms,
            rows[variant].rates["bytes"],
            built.memory / 1e9,
        )
        for variant, built in steps.items()
    ]


def _build(config: Any) -> step.Built:
    task = tasks.make(config.data.task, config.data.options)
    return step.build(config, task.objective, task.num_classes)


# ---- time by layer


def by_layer(config: Any, out: str) -> list[tuple[str, float]]:
    """The layers and the milliseconds of a step that their operations take, most first."""
    built = _build(config)
    built.run()
    folder = f"{out}/trace"
    with jax.profiler.trace(folder):
        for _ in range(_TRACED):
            built.run()
    files = sorted(epath.Path(folder).glob("plugins/profile/*/*.xplane.pb"))
    if not files:
        raise ConfigError(f"{folder}: this device writes no trace")
    data = jax.profiler.ProfileData.from_file(os.fspath(files[-1]))
    program = hlo.Program(built.program.as_text() or "")
    names = {
        name: provenance.layer(program.source(instruction))
        for computation in program.computations.values()
        for name, instruction in computation.items()
    }
    totals: dict[str, float] = collections.defaultdict(float)
    for name, nanoseconds in operations(data):
        totals[names.get(name, "outside of layers")] += nanoseconds / 1e6 / _TRACED
    return sorted(totals.items(), key=lambda found: -found[1])


def operations(data: Any) -> Iterable[tuple[str, float]]:
    """Operations of a trace and their own nanoseconds, without those of operations inside them."""
    for plane in data.planes:
        for line in plane.lines:
            events = []
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    events.append((event.start_ns, event.duration_ns, str(name)))
            yield from own_times(events)


def own_times(events: Iterable[tuple[float, float, str]]) -> Iterable[tuple[str, float]]:
    """The names and own times of nested (start, duration, name) events of one thread."""
    outer: list[list[Any]] = []  # [end, name, own time]
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while outer and outer[-1][0] <= start:
            _, done, own = outer.pop()
            yield done, own
        if outer:
            outer[-1][2] -= duration
        outer.append([start + duration, name, duration])
    for _, name, own in reversed(outer):
        yield name, own


# ---- text and plot


def _said(measured: Sequence[Measured]) -> str:
    return ", ".join(f"{m.variant} {m.milliseconds:,.0f} ms" for m in measured)


def _table(found: Sequence[Measured], variants: Sequence[str], lengths: Sequence[int]) -> str:
    base, *others = variants
    head = ["bytes", "rows", f"{base}, ms", "kB/s", "GB"]
    for variant in others:
        head += [f"{variant}, ms", "kB/s", "GB", "times as long"]
    rows = [head]
    for length in lengths:
        at = {m.variant: m for m in found if m.length == length}
        cells = [f"{length:,}", str(next(iter(at.values())).rows) if at else "—"]
        for variant in variants:
            if variant not in at:
                cells += ["left out", "—", "—"] + ["—"] * (variant != base)
                continue
            m = at[variant]
            cells += [f"{m.milliseconds:,.1f}", f"{m.bytes_per_second / 1e3:,.1f}"]
            cells.append(f"{m.memory_gb:.3f}")
            if variant != base:
                is_known = base in at
                cells.append(f"{m.milliseconds / at[base].milliseconds:.2f}" if is_known else "—")
        rows.append(cells)
    return study.table(rows)


def _layers_table(layers: Sequence[tuple[str, float]]) -> str:
    total = sum(ms for _, ms in layers) or 1.0
    rows = [["layer", "ms a step", "share"]]
    rows += [[name, f"{ms:.2f}", f"{ms / total:.1%}"] for name, ms in layers[:_SHOWN]]
    if rest := layers[_SHOWN:]:
        ms = sum(ms for _, ms in rest)
        rows.append([f"{len(rest)} more", f"{ms:.2f}", f"{ms / total:.1%}"])
    return study.table(rows)


def _plot(found: Sequence[Measured]) -> bytes | None:
    """Step time and memory by length, as a PNG."""
    figure = plots.new_figure(9, 4)
    if figure is None:
        return None
    for axes, name, label in zip(
        figure.subplots(1, 2), ("milliseconds", "memory_gb"), ("ms a step", "GB")
    ):
        for variant in study.distinct(m.variant for m in found):
            points = [(m.length, getattr(m, name)) for m in found if m.variant == variant]
            axes.plot(*zip(*points), marker="o", label=variant)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("bytes of a row")
        axes.set_ylabel(label)
        axes.legend()
    return plots.png(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
