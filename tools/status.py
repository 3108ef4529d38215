"""Reports the state of a run from the files in its workdir, on disk or on gs://; read-only.

    python -m tools.status WORKDIR [--json]
    watch -n 60 python -m tools.status WORKDIR

A run is "finished" when it has written result.json. Otherwise the age of the newest line of
metrics.jsonl decides. A run is "stalled" when no line has arrived for ten times the usual interval,
twice the longest interval so far, and at least two minutes, or when a stall report is newer than
the newest line. It is "stopped" after ten times that, or half an hour after a start without a line.
Whether a process is still alive cannot be seen from the files.
"""

import argparse
import contextlib
import itertools
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from spectral_pod import project_files, storage
from spectral_pod.errors import ConfigError, DataError

from . import shell

# Neither JAX nor TensorFlow is imported here, directly or indirectly: they take seconds.

_SPLITS = ("train", "validation", "test")
_DRAWN = ("train", "validation")
_RECENT = 200  # lines from which speed and intervals are estimated
_PATIENCE = 120.0  # seconds without a line before a run can count as stalled
_START_SECONDS = 1800.0  # without a line after a start, which compiles
_PANEL_WIDTH = 26  # columns of a curve, at least
_SPIKE_WINDOW = 20  # preceding lines that a loss is compared with


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("status", __doc__)
    parser.add_place("workdir", help="a folder or a gs:// URL")
    parser.add_argument("--json", action="store_true", help="the same facts as JSON")
    return shell.run(parser, show, argv)


def show(arguments: argparse.Namespace) -> None:
    workdir = arguments.workdir
    storage.check_access(workdir, write=False)
    metrics = project_files.Log(epath.Path(workdir) / "metrics.jsonl", project_files.METRICS)
    found = facts(workdir, metrics, time.time())
    if arguments.json:
        print(json.dumps(_jsonable(found), indent=1))
        return
    print("\n".join(report(found)))
    width = shutil.get_terminal_size((100, 24)).columns
    print(picture(metrics.lines, width, colour=sys.stdout.isatty()))


def facts(workdir: str, metrics: project_files.Log[dict[str, float]], now: float) -> dict[str, Any]:
    """The state of a run at the time `now`, in seconds since 1970.

    Raises:
      ConfigError: `workdir` is not the workdir of a run.
      DataError: a file of the run is damaged.
    """
    folder = epath.Path(workdir)
    lines = [line for line in metrics.lines if math.isfinite(line.get("wall_time", 0.0))]
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"{workdir} is no workdir of a run, or of one that still prepares its data: it has no "
            "config.json; give what the run has as its --workdir"
        )
    config = _sections(project_files.RUN.read(folder / "config.json")["config"], folder)
    result_file = folder / "result.json"
    result = project_files.RESULT.read(result_file) if result_file.exists() else None
    log = project_files.Log(folder / "starts.jsonl", project_files.START)
    starts = log.lines
    latest: dict[str, float] = {}
    for line in lines:
        latest |= line
    found = {
        "workdir": workdir,
        "task": config["task"],
        "model": config["model"],
        "step": int(latest.get("step", 0)),
        "total_steps": config["total_steps"],
        "starts": len(starts),
        "last_start": starts[-1] if starts else None,
        "checkpoint": _checkpoint(folder, now),
        "metrics": {split: _metrics(lines, split) for split in _SPLITS},
        "speed": {name: _speed(lines, name) for name in ("bytes_per_second", "steps_per_second")},
        "model_flops_utilisation": latest.get("speed/model_flops_utilisation"),
        "goodput": _below(latest, "goodput/"),
        "hosts": _below(latest, "host/"),
        "system": _below(latest, "system/"),
        "disk_free_gb": (
            None if storage.is_remote(workdir) else shutil.disk_usage(workdir).free / 1e9
        ),
        "result": result and result["eval"],
    }
    stalls = _files(folder / "stalls")  # their names begin with the time
    found |= _state(folder, lines, result, starts, stalls, now)
    found["eta_seconds"] = _eta(lines, starts, found) if found["state"] == "running" else None
    damaged = {"metrics.jsonl": metrics.damaged, "starts.jsonl": log.damaged}
    found["faults"] = [
        *(f"{count} line(s) of {name} are damaged" for name, count in damaged.items() if count),
        *_faults(folder, lines, found, stalls, now),
    ]
    return found


def _sections(config: Mapping[str, Any], folder: epath.Path) -> dict[str, Any]:
    """The facts that are shown of a configuration."""
    try:
        total_steps = config["train"]["total_steps"]
        if not (isinstance(total_steps, int) and total_steps > 0):
            raise ValueError("total_steps")
        names = {"task": str(config["data"]["task"]), "model": str(config["model"]["name"])}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}/config.json records no configuration ({error})") from error
    return names | {"total_steps": total_steps}


def _state(
    folder: epath.Path,
    lines: Sequence[Mapping[str, float]],
    result: Any,
    starts: Sequence[Mapping[str, Any]],
    stalls: Sequence[epath.Path],
    now: float,
) -> dict[str, str]:
    """The "state", and in "why" the evidence for it."""
    if result:
        return {"state": "finished", "why": "result.json is written"}
    newest = (
        lines[-1].get("wall_time", storage.modified(folder / "metrics.jsonl")) if lines else 0.0
    )
    created = newest or storage.modified(folder / "config.json")
    started = starts[-1]["wall_time"] if starts else created
    if stalls and storage.modified(stalls[-1]) > max(newest, started):
        return {"state": "stalled", "why": f"its newest file is {stalls[-1]}"}
    if started > newest:
        age = now - started
        state = "starting" if age < _START_SECONDS else "stopped"
        return {"state": state, "why": f"started {duration(age)} ago, and no metrics since"}
    intervals = [
        after - before
        for before, after in itertools.pairwise(_times(lines))
        if not any(before < start["wall_time"] <= after for start in starts)
    ]
    usual, longest = (statistics.median(intervals), max(intervals)) if intervals else (0.0, 0.0)
    patience = max(_PATIENCE, 10 * usual, 2 * longest)
    age = now - newest
    state = "running" if age <= patience else "stalled" if age <= 10 * patience else "stopped"
    rhythm = f"; they come every {duration(usual)}, at most {duration(longest)} apart"
    why = f"last metrics {duration(age)} ago{rhythm if intervals else ''}"
    return {"state": state, "why": why}


def _checkpoint(folder: epath.Path, now: float) -> dict[str, Any] | None:
    """The newest and the best sealed step, and the unsealed ones; None without checkpoints."""
    # The layout is that of train/checkpoint.py, which is not imported as it needs JAX and Orbax.
    seals: dict[int, project_files.Seal] = {}
    for file in _files(folder / "seals"):
        # A seal that cannot be read counts as none, as it does when the run continues.
        with contextlib.suppress(DataError):
            if file.suffix == ".json" and file.stem.isdecimal():
                seals[int(file.stem)] = project_files.SEAL.read(file)
    steps = {int(file.name) for file in _files(folder / "checkpoints") if file.name.isdecimal()}
    sealed = sorted(steps & seals.keys())
    unsealed = sorted(steps - seals.keys())
    if not steps:
        return None
    found: dict[str, Any] = {"step": None, "age_seconds": None, "unsealed": unsealed, "best": None}
    if sealed:
        found["step"] = sealed[-1]
        found["age_seconds"] = now - storage.modified(folder / "seals" / f"{sealed[-1]}.json")
        found["bytes"] = sum(file["bytes"] for file in seals[sealed[-1]]["files"].values())
    scores = {
        step: metrics for step in sealed if "score" in (metrics := seals[step]["metrics"] or {})
    }
    if scores:
        best = max(scores, key=lambda step: scores[step]["score"])
        found["best"] = {"step": best} | scores[best]
    return found


def _metrics(lines: Sequence[Mapping[str, float]], split: str) -> dict[str, Any] | None:
    """The newest metrics of a split, and the step with the lowest loss."""
    evaluated = [line for line in lines if f"{split}/loss" in line]
    if not evaluated:
        return None
    best = min(evaluated, key=lambda line: line[f"{split}/loss"])
    return {
        "step": int(evaluated[-1]["step"]),
        **_below(evaluated[-1], f"{split}/"),
        "best_step": int(best["step"]),
        "best_loss": best[f"{split}/loss"],
    }


def _speed(lines: Sequence[Mapping[str, float]], name: str) -> dict[str, float] | None:
    recent = [line[f"speed/{name}"] for line in lines[-_RECENT:] if f"speed/{name}" in line]
    return {"now": recent[-1], "median": statistics.median(recent)} if recent else None


def _eta(
    lines: Sequence[Mapping[str, float]], starts: Sequence[Mapping[str, Any]], found: Any
) -> float | None:
    """Seconds until the last step at the speed since the start, evaluations included."""
    since = starts[-1]["wall_time"] if starts else 0.0
    timed = [line for line in lines[-_RECENT:] if line.get("wall_time", -1.0) > since]
    steps = timed[-1]["step"] - timed[0]["step"] if timed else 0
    if not steps:
        return None
    pace = (timed[-1]["wall_time"] - timed[0]["wall_time"]) / steps
    return (found["total_steps"] - found["step"]) * pace


def _times(lines: Sequence[Mapping[str, float]]) -> list[float]:
    return [line["wall_time"] for line in lines[-_RECENT:] if "wall_time" in line]


def _faults(
    folder: epath.Path,
    lines: Sequence[Mapping[str, float]],
    found: Mapping[str, Any],
    stalls: Sequence[epath.Path],
    now: float,
) -> Iterator[str]:
    """Problems that a person should look at, a line each."""
    if bad := {int(line["step"]): line for line in lines if line.get("bad_steps")}:
        yield f"{len(bad)} bad step(s) were skipped, the last is {max(bad)}"
    if back := [line for line in lines if "rollback_to" in line]:
        yield (
            f"it was rolled back {len(back)} time(s), last from step {back[-1]['step']} to "
            f"{back[-1]['rollback_to']:.0f}"
        )
    if broken := [line["step"] for line in lines if not all(map(math.isfinite, line.values()))]:
        yield f"{len(broken)} line(s) of metrics are not finite, the last of step {broken[-1]}"
    losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    if spikes := _spikes(losses):
        shown = ", ".join(f"{loss:.4g} at step {step}" for step, loss in spikes[-3:])
        yield f"the training loss jumped {len(spikes)} time(s): {shown}"
    for file in _files(folder / "quarantine"):
        if file.suffix == ".txt":
            text = file.read_bytes().decode(errors="replace")
            reason = text.partition("\n")[0]
            yield f"checkpoint {file.stem} is in quarantine: {reason}"
    if stalls:
        age = duration(now - storage.modified(stalls[-1]))
        yield f"{len(stalls)} report(s) of a stall, the newest of {age} ago: {stalls[-1]}"
    checkpoint, free = found["checkpoint"], found["disk_free_gb"]
    if checkpoint is None and lines and found["state"] != "running":
        yield "there is no checkpoint: a restart begins anew"
    if checkpoint and checkpoint["unsealed"] and found["state"] != "running":
        yield f"checkpoint(s) {checkpoint['unsealed']} have no seal: a restart takes none of them"
    if checkpoint and free is not None and free * 1e9 < 3 * checkpoint.get("bytes", 0):
        yield f"the disk has {free:.2f} GB free, less than three checkpoints take"


def _spikes(losses: Sequence[tuple[float, float]]) -> list[tuple[int, float]]:
    """(step, loss) of losses far above the preceding ones, relative to their scatter."""
    found = []
    for i in range(_SPIKE_WINDOW, len(losses)):
        before = [loss for _, loss in losses[i - _SPIKE_WINDOW : i]]
        middle = statistics.median(before)
        scatter = statistics.median(abs(loss - middle) for loss in before)
        step, loss = losses[i]
        if loss > middle + 10 * scatter and loss > 1.2 * middle:
            found.append((int(step), loss))
    return found


def report(found: Mapping[str, Any]) -> list[str]:
    """The facts as lines of text."""
    lines = [f"{found['workdir']}: {found['model']} on {found['task']}"]
    health = (("health", [fault]) for fault in found["faults"] or ["no fault seen"])
    for name, parts in (*_progress(found), *_results(found), *_resources(found), *health):
        if present := [part for part in parts if part]:
            lines.append(f"{name:<12}{'; '.join(present)}")
    return lines


_Line = tuple[str, Sequence[Any]]  # its name, and its parts; false ones are omitted


def _progress(found: Mapping[str, Any]) -> Iterator[_Line]:
    eta, speed, mfu = found["eta_seconds"], found["speed"], found["model_flops_utilisation"]
    yield "state", [f"{found['state']}: {found['why']}"]
    share = found["step"] / found["total_steps"]
    steps = f"{found['step']:,} of {found['total_steps']:,} ({share:.1%})"
    yield "step", [steps, eta is not None and f"done in {duration(eta)}"]
    if start := found["last_start"]:
        starts = f"{found['starts']}, the last at step {start['step']:,}"
        yield "starts", [starts, f"{start['devices']} of {start['processes']} process(es)"]
    units = (("bytes_per_second", 1e3, "kB/s"), ("steps_per_second", 1, "steps/s"))
    yield (
        "speed",
        [
            f"{values['now'] / scale:,.4g} {unit} (median {values['median'] / scale:,.4g})"
            for name, scale, unit in units
            if (values := speed[name])
        ]
        + [mfu and f"model FLOPs utilisation {mfu:.1%}"],
    )
    goodput = dict(found["goodput"])
    fraction = goodput.pop("fraction", None)
    lost = sorted(goodput.items(), key=lambda item: -item[1])
    yield (
        "goodput",
        [fraction is not None and f"{fraction:.1%}"]
        + [
            f"{name.removesuffix('_seconds').replace('_', ' ')} {duration(spent)}"
            for name, spent in lost
            if spent
        ],
    )
    hosts = found["hosts"]
    if math.isfinite(hosts.get("slowest", math.nan)):
        slowest = int(hosts["slowest"])
        times = {name: hosts.get(f"{slowest}/{name}_seconds") for name in ("p50", "p99")}
        shown = [f"{name} {t:.3g} s a step" for name, t in times.items() if t is not None]
        yield "hosts", [f"the slowest is process {slowest}", *shown]


def _results(found: Mapping[str, Any]) -> Iterator[_Line]:
    checkpoint = found["checkpoint"]
    if checkpoint is None:
        yield "checkpoint", ["none yet"]
    else:
        step, best, unsealed = checkpoint["step"], checkpoint["best"], checkpoint["unsealed"]
        yield (
            "checkpoint",
            [
                step is not None
                and f"step {step:,}, sealed {duration(checkpoint['age_seconds'])} ago",
                unsealed and f"not sealed: {', '.join(map(str, unsealed))}",
                best and f"best is step {best['step']:,} ({_scores(best)})",
            ],
        )
    for split, values in found["metrics"].items():
        if values:
            lowest = f"lowest loss {values['best_loss']:.4f} at step {values['best_step']:,}"
            yield split, [f"{_scores(values)} at step {values['step']:,}", lowest]


def _resources(found: Mapping[str, Any]) -> Iterator[_Line]:
    system, free, checkpoint = found["system"], found["disk_free_gb"], found["checkpoint"]
    names = {
        "host_memory_gb": "memory",
        "host_memory_available_gb": "available",
        "device_memory_gb": "device memory",
        "device_memory_peak_gb": "at its peak",
    }
    yield (
        "system",
        [f"{text} {system[name]:.3g} GB" for name, text in names.items() if name in system],
    )
    size = checkpoint and checkpoint.get("bytes")
    yield (
        "disk",
        [
            free is not None and f"{free:.4g} GB free",
            size and f"a checkpoint takes {size / 1e9:.3g} GB",
        ],
    )


def picture(lines: Sequence[Mapping[str, float]], width: int, *, colour: bool) -> str:
    """Curves for a terminal of `width` columns; "" where no curve has two points."""
    import plotext

    metric = "bits_per_byte" if any("train/bits_per_byte" in line for line in lines) else "accuracy"
    panels = (
        ("loss", {split: f"{split}/loss" for split in _DRAWN}, 1.0),
        (metric.replace("_", " "), {split: f"{split}/{metric}" for split in _DRAWN}, 1.0),
        ("kB a second", {"": "speed/bytes_per_second"}, 1e3),
    )
    curves: dict[str, dict[str, dict[float, float]]] = {}  # by panel and label
    for title, tags, scale in panels:
        for label, tag in tags.items():
            points = {
                line["step"]: line[tag] / scale
                for line in lines
                if abs(line.get(tag, math.nan)) < 1e100  # plotext overflows beyond
            }
            if len(points) > 1:
                curves.setdefault(title, {})[label] = points
    if not curves:
        return ""
    wide = width >= _PANEL_WIDTH * len(curves)
    rows, columns = (1, len(curves)) if wide else (len(curves), 1)
    plotext.terminal.limit(False, False)
    figure = plotext.figure.clear().plot_size(width, 14 * rows)
    if len(curves) > 1:
        figure = figure.subplots(rows, columns)
    for i, (title, drawn) in enumerate(curves.items()):
        panel = figure if len(curves) == 1 else figure.subplot(i // columns + 1, i % columns + 1)
        panel.theme("default" if colour else "colorless")
        for label, points in drawn.items():
            signal = panel.signal(list(points), list(points.values())).lines()
            panel.draw(signal.label(label) if label else signal)
        panel.title(title)
        steps = [step for points in drawn.values() for step in points]
        first, last = int(min(steps)), int(max(steps))
        ticks = [first, (first + last) // 2, last]
        panel.ruler("x").ticks(ticks, [f"{step:,}" for step in ticks])
        values = {value for points in drawn.values() for value in points.values()}
        if len(values) == 1:  # plotext would choose a range of 2
            panel.ruler("y").lim(0, 2 * values.pop() or 1)
    return figure.build().string(colorless=not colour).rstrip("\n")


def _scores(values: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {values[name]:.4f}"
        for name in ("bits_per_byte", "loss", "accuracy")
        if name in values
    )


def _below(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The values whose name starts with `prefix`, by the rest of the name."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _files(folder: epath.Path) -> list[epath.Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3:04 min, 5:12 h, 3.2 days."""
    if not math.isfinite(seconds) or seconds > 1e12:
        return "an unknown time"
    seconds = max(seconds, 0.0)  # clocks differ
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = divmod(int(seconds), 60), divmod(int(seconds / 60), 60)
    if seconds < 3600:
        return f"{minutes[0]}:{minutes[1]:02d} min"
    return f"{hours[0]}:{hours[1]:02d} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _jsonable(value: Any) -> Any:
    """The value with null for numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {name: _jsonable(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_jsonable(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
