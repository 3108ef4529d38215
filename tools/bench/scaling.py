"""Weak scaling: what a larger slice costs each chip, and what more processes cost each other.

    python -m tools.bench.scaling --config=configs/lra_listops.py --config.mesh.fsdp=8 \\
        --config.train.global_batch_size=128 --topologies=v4:4x4x8,v4:8x8x8,v4:16x16x16
    python -m tools.bench.scaling --config=configs/quickstart.py \\
        --config.train.global_batch_size=8 --processes=1,2,4

The config's batch is that of the first topology, or of one process; it grows in proportion, and
mesh.data with it.

--topologies compiles the training step for each of them, as `tools.preflight` does, and prints the
bytes that one chip sends in a step: in a ring of n chips each sends (n-1)/n of an array, and twice
that for an all-reduce. That grows with n, but is bounded by the array (twice the array). What must
not grow is the payload, the arrays themselves.

--processes starts that many trainers of one CPU device each on this machine: first as one run whose
processes communicate over loopback, then as independent runs of one process each, which do the same
work and share the same cores without waiting for each other. The difference is communication and
waiting. Process i is pinned to core i; where there are fewer cores, processes share them and CPU
time is more telling than wall time.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
from ml_collections import ConfigDict

from spectral_pod.analysis import hardware
from spectral_pod.errors import ConfigError
from spectral_pod.fields import Positive

from .. import shell

_WINDOW = 5  # steps
_WARM_WINDOWS = 1  # before what is measured
_SECONDS = 600  # time limit of a run


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("bench.scaling", __doc__)
    parser.add_config()
    parser.add_argument("--topologies", default="", metavar="A,B", help="slices, smallest first")
    parser.add_argument("--processes", default="", metavar="N,M", help="counts, smallest first")
    parser.add_value("--windows", Positive, 4, "of five steps, to measure in every run (4)")
    parser.add_output("--json", "write the rows to this file as well")
    return shell.run(parser, measure, argv)


def measure(arguments: argparse.Namespace) -> None:
    topologies, processes = (
        text.split(",") if text else [] for text in (arguments.topologies, arguments.processes)
    )
    if bool(topologies) == bool(processes):
        raise ConfigError("give --topologies or --processes, and nothing but options")
    rows: list[Any]
    if topologies:
        rows = _slices(arguments.config, topologies)
        print(_slices_table(rows))
    else:
        rows = _all_runs(arguments, processes)
        print(_runs_table(rows))
    if arguments.json:
        shell.write(arguments.json, json.dumps([row._asdict() for row in rows], indent=1) + "\n")


# ---- slices, by compilation


class Slice(NamedTuple):
    """The communication of one chip of a slice in a training step."""

    topology: str
    chips: int
    mesh: dict[str, int]
    batch: int
    sent: dict[str, float]  # bytes, by kind of collective
    payload: int  # bytes of the arrays that are communicated
    grows: bool  # an array is larger than on the first slice


def _slices(config: ConfigDict, names: Sequence[str]) -> list[Slice]:
    topologies = [hardware.parse(name) for name in names]
    hardware.prepare(max(topologies, key=lambda topology: topology.num_chips))
    from spectral_pod.analysis import hlo  # which import JAX

    from .. import compiled_step

    first: list[hlo.Collective] | None = None
    slices = []
    for topology in topologies:
        ratio, rest = divmod(topology.num_chips, topologies[0].num_chips)
        if rest:
            raise ConfigError(f"{topology} is no multiple of {topologies[0]}, the first topology")
        mine = ConfigDict(config.to_dict())
        mine.mesh.data = -1
        mine.train.global_batch_size *= ratio
        mine.train.eval_batch_size = mine.train.global_batch_size
        setup = compiled_step.set_up(mine, topology)
        setup = dataclasses.replace(setup, lowered={"train": setup.lowered["train"]})
        (compiled,) = compiled_step.compile_all([setup], shell.say)
        if compiled["train"].out_of_memory:
            raise ConfigError(f"{topology}: {compiled['train'].out_of_memory.splitlines()[0]}")
        mesh = dict(setup.mesh.shape)
        found = hlo.collectives(compiled["train"].text, mesh, topology.num_slices)
        first = found if first is None else first
        sent: dict[str, float] = collections.defaultdict(float)
        for one in found:
            sent[one.kind] += one.count * one.sent
        slices.append(
            Slice(
                topology=str(topology),
                chips=topology.num_chips,
                mesh={axis: size for axis, size in mesh.items() if size > 1},
                batch=mine.train.global_batch_size,
                sent=dict(sent),
                payload=sum(one.count * one.bytes for one in found),
                grows=bool(hlo.grown(first, found)),
            )
        )
    return slices


def _slices_table(slices: Sequence[Slice]) -> str:
    kinds = sorted({kind for one in slices for kind in one.sent})
    totals = [sum(one.sent.values()) for one in slices]
    lines = [
        ("chips", "mesh", "batch", *kinds, "sent, MB", "ratio", "payload, MB", "ratio", "grows")
    ]
    for one, total in zip(slices, totals, strict=True):
        lines.append(
            (
                f"{one.chips:,}",
                " x ".join(f"{axis}={size}" for axis, size in one.mesh.items()),
                f"{one.batch:,}",
                *(f"{one.sent.get(kind, 0) / 1e6:.3f}" for kind in kinds),
                f"{total / 1e6:.3f}",
                f"{total / totals[0]:.4f}" if totals[0] else "",
                f"{one.payload / 1e6:.3f}",
                f"{one.payload / slices[0].payload:.4f}" if slices[0].payload else "",
                "GROWS" if one.grows else "no",
            )
        )
    return _aligned(lines)


# ---- processes on this machine


class Run(NamedTuple):
    """The time of a training step with that many concurrent processes."""

    processes: int
    joined: bool  # one run of all of them; otherwise independent runs
    batch: int  # rows of one run
    wall_ms: float  # of a step, including the wait for its data; median
    data_ms: float  # the wait for data
    cpu_ms: float  # of a process, mean
    load: float  # of the machine in the minute before


def _all_runs(arguments: argparse.Namespace, counts: Sequence[str]) -> list[Run]:
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ConfigError(f"--processes={','.join(counts)}: it takes numbers such as 1,2,4")
    rows = []
    for count in map(int, counts):
        for joined in (True, False) if count > 1 else (True,):
            rows.append(_run(arguments, count, joined))
            shell.say(f"{count} processes, {'one run' if joined else 'a run each'}: done")
    return rows


def _run(arguments: argparse.Namespace, count: int, joined: bool) -> Run:
    """Starts the trainers, and ends them when all have run the steps to be measured."""
    batch = arguments.config.train.global_batch_size * (count if joined else 1)
    load = os.getloadavg()[0]
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-scaling-"))
        )
        address = f"127.0.0.1:{_free_port()}"
        workdirs = [folder / ("run" if joined else f"run-{i}") for i in range(count)]
        trainers = []
        for i, workdir in enumerate(workdirs):
            command = [
                sys.executable, "-m", "spectral_pod.main",
                *arguments.config_flags,
                f"--workdir={workdir}", f"--config.train.global_batch_size={batch}",
                f"--config.train.log_every_steps={_WINDOW}",
                "--config.train.total_steps=1000000", "--config.checkpoint.every_steps=1000000",
                "--config.train.eval_every_steps=1000000",
                "--config.train.compilation_cache=False",
            ]  # fmt: skip
            if joined:
                command += [
                    f"--coordinator_address={address}", f"--num_processes={count}",
                    f"--process_id={i}",
                ]  # fmt: skip
            log = stack.enter_context(open(folder / f"{i}.log", "w+"))
            trainer = psutil.Popen(
                command,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=functools.partial(os.sched_setaffinity, 0, {cores[i % len(cores)]}),
            )
            stack.callback(trainer.wait)
            stack.callback(trainer.kill)
            trainers.append((trainer, workdir / "metrics.jsonl", log))
        before = _wait(trainers, 1 + _WARM_WINDOWS)
        after = _wait(trainers, 1 + _WARM_WINDOWS + arguments.windows)
        lines = [
            json.loads(line)
            for metrics in {metrics for _, metrics, _ in trainers}
            for line in metrics.read_text().splitlines()[1 + _WARM_WINDOWS :]
        ]
    seconds = [1 / line["speed/steps_per_second"] for line in lines]
    shares = [(line["time_share/data"], line["time_share/step"]) for line in lines]
    waits = [data / (data + step) for data, step in shares]
    cpu = [(y.cpu - x.cpu) / (y.steps - x.steps) for x, y in zip(before, after, strict=True)]
    return Run(
        processes=count,
        joined=joined,
        batch=batch,
        wall_ms=1e3 * statistics.median(seconds),
        data_ms=1e3 * statistics.median(s * w for s, w in zip(seconds, waits, strict=True)),
        cpu_ms=1e3 * statistics.mean(cpu),
        load=load,
    )


class _Spent(NamedTuple):
    steps: int
    cpu: float  # seconds


def _wait(trainers: Sequence[tuple[Any, pathlib.Path, Any]], num_lines: int) -> list[_Spent]:
    """Waits until every run has written that many lines of metrics; what each process used."""
    deadline = time.monotonic() + _SECONDS
    spent: list[_Spent | None] = [None] * len(trainers)
    while None in spent:
        for i, (trainer, metrics, log) in enumerate(trainers):
            if trainer.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise ConfigError(f"a trainer has ended or takes too long:\n{log.read()[-2000:]}")
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if spent[i] is None and len(lines) >= num_lines:
                used = trainer.cpu_times()
                spent[i] = _Spent(json.loads(lines[-1])["step"], used.user + used.system)
        time.sleep(0.02)
    return [one for one in spent if one is not None]


def _runs_table(runs: Sequence[Run]) -> str:
    lines: list[tuple[str, ...]] = [
        (
            "processes", "batch", "wall ms", "independent", "communication, waiting", "data",
            "CPU ms a process", "independent", "more", "load",
        )
    ]  # fmt: skip
    independent = {run.processes: run for run in runs if not run.joined}
    for run in (run for run in runs if run.joined):
        other = independent.get(run.processes, run)
        lines.append(
            (
                str(run.processes),
                str(run.batch),
                f"{run.wall_ms:.0f}",
                f"{other.wall_ms:.0f}",
                f"{1 - other.wall_ms / run.wall_ms:.1%}",
                f"{run.data_ms / run.wall_ms:.1%}",
                f"{run.cpu_ms:.0f}",
                f"{other.cpu_ms:.0f}",
                f"{run.cpu_ms / other.cpu_ms - 1:.1%}",
                f"{run.load:.1f}, {other.load:.1f}",
            )
        )
    return f"{_aligned(lines)}\n\n{os.cpu_count()} cores"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
