"""What `tools.lra` prints: the states of its cells, and their tables beside published figures."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from . import study

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


@dataclasses.dataclass
class Cell(study.Cell):
    """A model on a task from a seed."""

    task: str
    model: str

    @property
    def kind(self) -> tuple[str, ...]:
        return self.task, self.model

    @property
    def data(self) -> str:
        return self.task

    @classmethod
    def parse(cls, name: str) -> "Cell | None":
        """The cell with the name of a folder; None if it is no cell's."""
        task, _, rest = name.partition("-")
        model, _, seed = rest.partition("-")
        named = task in TASKS and model and seed.isdecimal()
        return cls(task, model, seed=int(seed)) if named else None

    def read(self, out: str) -> None:
        super().read(out)
        if self.is_done and self.task == "retrieval":
            data = study.config(epath.Path(out) / self.name)["data"]
            if not (data["options"].get("source") or data.get("stores")):
                self.facts["notes"].append("substitute for AAN")


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
        return {"seeds": 0, "asked": len(cells), "states": study.distinct(c.state for c in cells)}
    mean, error = study.mean_and_error([facts["accuracy"] for facts in done])
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
        "notes": study.distinct(note for facts in done for note in facts["notes"]),
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
    parts.append(study.missing(found["cells"]))
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
    return study.table(rows)


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
    splits = study.distinct(cell["split"] for cell in found["cells"] if "split" in cell)
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
            model, TASKS[task], study.count(x["parameters"]), study.count(x["steps"]),
            study.count(x["bytes_per_second"]), study.memory(x),
            "—" if x["seconds"] is None else f"{x['seconds'] / 3600:.2f}",
        ]
        for model, row in found["models"].items()
        for task, x in row["tasks"].items()
        if x["seeds"]
    ]  # fmt: skip
    if not rows:
        return ""
    return study.table([head, *rows]) + "\n\nHours are those of each run's last start."


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"
