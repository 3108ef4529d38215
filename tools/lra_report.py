"""What `tools.lra` prints: the states of its cells, and their tables beside published figures."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from spectral_pod import project_files
from spectral_pod.errors import DataError

# Neither JAX nor TensorFlow is imported here, directly or indirectly: they take seconds.

TASKS = {  # the names of the columns
    "listops": "ListOps",
    "text": "Text",
    "retrieval": "Retrieval",
    "image": "Image",
    "pathfinder": "Pathfinder",
    "path_x": "Path-X",
}
# Accuracy on the test split in percent, in the order of TASKS; None: not above chance. From Tay et
# al. 2020, "Long Range Arena" (the first three); Lee-Thorp et al. 2021, "FNet"; Gu et al. 2022,
# "Efficiently Modeling Long Sequences with Structured State Spaces" (S4 as updated in its third
# version); Smith et al. 2023, "Simplified State Space Layers" (S5); and Ma et al. 2022, "Mega".
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "transformer": (36.37, 64.27, 57.46, 42.44, 71.40, None),
    "linformer": (35.70, 53.94, 52.27, 38.56, 76.34, None),
    "linear_transformer": (16.13, 65.90, 53.09, 42.34, 75.30, None),
    "fnet": (35.33, 65.11, 59.61, 38.67, 77.80, None),
    "s4": (59.60, 86.82, 90.90, 88.65, 94.20, 96.35),
    "s5": (62.15, 89.31, 91.40, 88.00, 95.33, 98.58),
    "mega": (63.14, 90.43, 91.25, 90.44, 96.01, 97.98),
}
_CHANCE = 50.0  # what the published means count where a model is not above chance, on Path-X
_CHECKED = ("device_memory_peak_gb", "host_memory_gb")  # the first that a run has recorded


@dataclasses.dataclass
class Cell:
    """One run: a model on a task from a seed.

    Attributes:
      state: "done", or why there is no figure: "step 350 of 700", "not run", "failed (1)".
      facts: of a run that is done: what `read` finds.
    """

    task: str
    model: str
    seed: int
    state: str = "not run"
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.task}-{self.model}-{self.seed}"

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    @classmethod
    def parse(cls, name: str) -> "Cell | None":
        """The cell with the name of a folder; None if it is no cell's."""
        task, _, rest = name.partition("-")
        model, _, seed = rest.partition("-")
        named = task in TASKS and model and seed.isdecimal()
        return cls(task, model, int(seed)) if named else None

    def read(self, out: str) -> None:
        """Sets `state` and `facts` from the cell's workdir.

        Raises:
          DataError: a file there is damaged.
        """
        folder = epath.Path(out) / self.name
        self.state, self.facts = "not run", {}
        if (folder / "result.json").exists():
            self.state = "done"
            self.facts = _facts(project_files.RESULT.read(folder / "result.json"), folder)
            if self.task == "retrieval":
                data = _config(folder)["data"]
                if not (data["options"].get("source") or data.get("stores")):
                    self.facts["notes"].append("substitute for AAN")
        elif (folder / "config.json").exists():
            config = _config(folder)
            log = project_files.Log(folder / "metrics.jsonl", project_files.METRICS)
            step = max((line["step"] for line in log.lines), default=0)
            self.state = f"step {step:,.0f} of {config['train']['total_steps']:,}"


def _config(folder: epath.Path) -> Any:
    """The configuration of a run."""
    return project_files.RUN.read(folder / "config.json")["config"]


def _facts(result: Any, folder: epath.Path) -> dict[str, Any]:
    """Of a result: accuracy in percent, memory in GB, time in seconds; None where not recorded.

    `memory` is the peak of a device, or without that (on CPUs) the highest of the process's memory
    whenever metrics were written; `memory_of` says which. `notes` are what makes the accuracy
    another one than the published.
    """
    evaluation = result["eval"]
    if "accuracy" not in evaluation:
        raise DataError(f"{folder}/result.json has no accuracy; delete it to evaluate again")
    log = project_files.Log(folder / "metrics.jsonl", project_files.METRICS)
    memory = {
        name: max(line[f"system/{name}"] for line in log.lines if f"system/{name}" in line)
        for name in _CHECKED
        if any(f"system/{name}" in line for line in log.lines)
    }
    kind = next(iter(memory), None)
    return {
        "split": evaluation["split"],
        "accuracy": 100 * evaluation["accuracy"],
        "ladder": result.get("ladder"),
        "parameters": result.get("num_params"),
        "steps": result["step"],
        "bytes_per_second": result.get("bytes_per_second"),
        "memory": memory.get(kind) if kind else None,
        "memory_of": kind and kind.partition("_")[0],
        "seconds": result.get("wall_seconds"),
        "notes": ["process-supervised"] if "supervision" in result else [],
    }


def found(out: str) -> list[Cell]:
    """The cells that have a folder in `out`."""
    folder = epath.Path(out)
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return [cell for name in sorted(names) if (cell := Cell.parse(name)) is not None]


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything that the tables show, as JSON: by model and task, and the cells themselves."""
    tasks = [task for task in TASKS if any(cell.task == task for cell in cells)]
    models = list(dict.fromkeys(cell.model for cell in cells))
    rows = {
        model: {
            task: _of_seeds([c for c in cells if (c.model, c.task) == (model, task)])
            for task in tasks
        }
        for model in models
    }
    return {
        "tasks": tasks,
        "models": {model: {"tasks": row, "mean": _mean(row)} for model, row in rows.items()},
        "published": {model: _published(model, tasks) for model in PUBLISHED},
        "cells": [{"name": c.name, "state": c.state} | c.facts for c in cells],
    }


def _of_seeds(cells: Sequence[Cell]) -> dict[str, Any]:
    """The figures of a model on a task: the mean of its seeds, with its standard error."""
    done = [cell.facts for cell in cells if cell.is_done]
    if not done:
        return {"seeds": 0, "asked": len(cells), "states": _distinct(c.state for c in cells)}
    accuracies = [facts["accuracy"] for facts in done]
    mean = statistics.fmean(accuracies)
    error = statistics.stdev(accuracies) / math.sqrt(len(done)) if len(done) > 1 else None
    of_all = {
        name: [facts[name] for facts in done if facts[name] is not None]
        for name in ("bytes_per_second", "seconds", "memory")
    }
    memory, ladder = of_all.pop("memory"), next((f["ladder"] for f in done if f["ladder"]), None)
    return {
        "seeds": len(done),
        "asked": len(cells),
        "accuracy": mean,
        "standard_error": error,
        "ladder": ladder,
        "rung": ladder and _rung(mean, ladder),
        "notes": _distinct(note for facts in done for note in facts["notes"]),
        "parameters": done[0]["parameters"],
        "steps": done[0]["steps"],
        "memory": max(memory, default=None),
        "memory_of": done[0]["memory_of"],
        **{name: statistics.fmean(values) if values else None for name, values in of_all.items()},
    }


def _rung(accuracy: float, ladder: Mapping[str, float]) -> str:
    """The highest rung of ListOps' ladder (fractions) that an accuracy in percent reaches."""
    reached = [int(k) for k, share in ladder.items() if accuracy >= 100 * share]
    return f"rung {max(reached)}" if reached else "below rung 0"


def _mean(row: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Over tasks, if the model has a figure on each."""
    figures = [found.get("accuracy") for found in row.values()]
    known = [x for x in figures if x is not None]
    return statistics.fmean(known) if known and len(known) == len(figures) else None


def _published(model: str, tasks: Sequence[str]) -> dict[str, Any]:
    figures = dict(zip(TASKS, PUBLISHED[model], strict=True))
    of_tasks = {task: figures[task] for task in tasks}
    counted = [_CHANCE if x is None else x for x in of_tasks.values()]
    return {"tasks": of_tasks, "mean": statistics.fmean(counted) if counted else None}


def tables(found: Mapping[str, Any]) -> str:
    """The Markdown of a `summary`."""
    if not found["cells"]:
        return "There are no cells.\n"
    parts = [_accuracies(found), *_notes(found), _costs(found)]
    missing = [f"- {c['name']}: {c['state']}" for c in found["cells"] if c["state"] != "done"]
    if missing:
        parts.append("\n".join(["Cells without a result:", "", *missing]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _accuracies(found: Mapping[str, Any]) -> str:
    tasks = found["tasks"]
    rows = [["model", *(TASKS[task] for task in tasks), "mean"]]
    for model, row in found["models"].items():
        cells = [_accuracy(row["tasks"][task]) for task in tasks]
        rows.append([f"**{model}**", *cells, _number(row["mean"])])
        if model in found["published"]:
            rows.append(_published_row(found["published"][model], f"{model}, published"))
    others = found["published"].keys() - found["models"].keys()
    for model in (name for name in PUBLISHED if name in others):
        rows.append(_published_row(found["published"][model], f"{model}, published"))
    return _table(rows)


def _published_row(row: Mapping[str, Any], name: str) -> list[str]:
    return [name, *(_number(x) for x in row["tasks"].values()), _number(row["mean"])]


def _accuracy(figures: Mapping[str, Any]) -> str:
    if not figures["seeds"]:
        return ", ".join(figures["states"])
    text = _number(figures["accuracy"])
    if figures["standard_error"] is not None:
        text += f" ± {figures['standard_error']:.2f}"
    notes = [*([figures["rung"]] if figures["rung"] else []), *figures["notes"]]
    if figures["seeds"] < figures["asked"]:
        notes.append(f"{figures['seeds']} of {figures['asked']} seeds")
    return f"{text} ({', '.join(notes)})" if notes else text


def _notes(found: Mapping[str, Any]) -> list[str]:
    """What the first table means."""
    splits = _distinct(cell["split"] for cell in found["cells"] if "split" in cell)
    lines = [
        f"Accuracy in percent on the {' and '.join(splits or ['test'])} split, ± the standard "
        "error of the mean over seeds. Published figures are of full sizes and their data "
        "(configs/lra_*.py say what cpu presets change); their means count "
        f"{_CHANCE:.0f} where a model is not above chance. Sources: `tools/lra_report.py`."
    ]
    models = found["models"].values()
    ladders = [row["tasks"].get("listops", {}).get("ladder") for row in models]
    if ladder := next(filter(None, ladders), None):
        rungs = ", ".join(f"{k}: {100 * share:.1f}" for k, share in sorted(ladder.items()))
        lines.append(
            "ListOps: rung k is what evaluating the top k levels of each expression exactly earns "
            f"({rungs})."
        )
    return lines


def _costs(found: Mapping[str, Any]) -> str:
    head = ["model", "task", "parameters", "steps", "bytes/s", "peak memory", "hours"]
    rows = [
        [
            model, TASKS[task], _count(x["parameters"]), _count(x["steps"]),
            _count(x["bytes_per_second"]), _memory(x),
            "—" if x["seconds"] is None else f"{x['seconds'] / 3600:.2f}",
        ]
        for model, row in found["models"].items()
        for task, x in row["tasks"].items()
        if x["seeds"]
    ]  # fmt: skip
    if not rows:
        return ""
    return _table([head, *rows]) + "\n\nHours are those of each run's last start."


def _memory(figures: Mapping[str, Any]) -> str:
    if figures["memory"] is None:
        return "—"
    return f"{figures['memory']:.2f} GB ({figures['memory_of']})"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def _count(value: float | None) -> str:
    return "—" if value is None else f"{value:,.0f}"


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
