"""What `tools.sweep` prints and writes: a table, plots, and the best configuration."""

import json
import warnings
from typing import Any

import optuna
from etils import epath

from spectral_pod import config as config_lib
from spectral_pod import storage

from . import plots, study


def table(sweep: optuna.Study) -> str:
    """The Markdown of all trials, the best first."""
    trials = _trials(sweep)
    if not trials:
        return "There are no trials.\n"
    names = study.distinct(name for trial in trials for name in trial.params)
    rows = [["trial", "value", *names, "state", "minutes"]]
    for trial in trials:
        value = _value(trial)
        rows.append([
            str(trial.number), "—" if value is None else f"{value:.4f}",
            *(_shown(trial.params.get(name)) for name in names), _state(trial),
            "—" if trial.duration is None else f"{trial.duration.total_seconds() / 60:.1f}",
        ])  # fmt: skip
    direction = "highest" if _maximizes(sweep) else "lowest"
    return f"{study.table(rows)}\n\nValues are of the validation split; the {direction} is best.\n"


def facts(sweep: optuna.Study) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "rows": [
            {"trial": trial.number, "value": _value(trial), "state": _state(trial), **trial.params}
            for trial in _trials(sweep)
        ]
    }


def _trials(sweep: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """All trials, the best first."""
    return sorted(sweep.get_trials(deepcopy=False), key=lambda trial: _rank(sweep, trial))


def _value(trial: optuna.trial.FrozenTrial) -> float | None:
    return trial.value if trial.state.is_finished() else None


def _maximizes(sweep: optuna.Study) -> bool:
    return sweep.direction == optuna.study.StudyDirection.MAXIMIZE


def _rank(sweep: optuna.Study, trial: optuna.trial.FrozenTrial) -> tuple[bool, float, int]:
    """Orders trials: complete ones by their value, then the others."""
    complete = trial.state == optuna.trial.TrialState.COMPLETE
    value = (trial.value or 0.0) if complete else 0.0
    return not complete, -value if _maximizes(sweep) else value, trial.number


def _state(trial: optuna.trial.FrozenTrial) -> str:
    steps = trial.intermediate_values
    if trial.state == optuna.trial.TrialState.PRUNED and steps:
        return f"pruned at {max(steps):,}"
    return trial.state.name.lower()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(sweep: optuna.Study, out: str) -> None:
    """Writes the table, and if there are results the plots and the best configuration."""
    folder = epath.Path(out)
    storage.write_whole(folder / "table.md", table(sweep))
    storage.write_whole(folder / "table.json", json.dumps(facts(sweep), indent=1) + "\n")
    complete = (optuna.trial.TrialState.COMPLETE,)
    trials = sweep.get_trials(deepcopy=False, states=complete)
    if not trials:
        return
    best = sweep.best_trial
    recorded = study.config(folder / f"trial-{best.number:04d}")
    storage.write_whole(folder / "best.py", config_file(recorded, best, out))
    for name, picture in _pictures(sweep, len(trials)).items():
        storage.write_whole(folder / name, picture)


def config_file(recorded: dict[str, Any], best: optuna.trial.FrozenTrial, out: str) -> str:
    """The text of a config file that has the fields of a recorded configuration.

    Its last evaluation is on the validation split, as that of the trials; the test split is
    --config.train.eval_split=test.
    """
    defaults = config_lib.flat(config_lib.to_dict(config_lib.default()))
    options = recorded["data"].pop("options")
    lines = [f"    c.data.options = ConfigDict({options!r})"]
    for name, value in sorted(config_lib.flat(recorded).items()):
        value = tuple(value) if isinstance(value, list) else value
        if name not in defaults or value != defaults[name]:
            lines.append(f"    c.{name} = {value!r}")
    body = "\n".join(lines)
    return f'''"""The best of the sweep {out}: trial {best.number}.

It reached {best.value:.4f} on the validation split, on which its last evaluation is here, too:
--config.train.eval_split=test is the other.
"""

from ml_collections import ConfigDict

from spectral_pod.config import Config, default


def get_config() -> Config:
    c = default()
{body}
    return c
'''


def _pictures(sweep: optuna.Study, number: int) -> dict[str, bytes]:
    """The values in the order of trials and, of several, the importance of each field."""
    if plots.new_figure(1, 1) is None:
        return {}
    from optuna.visualization import matplotlib as drawing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        drawn = {"history.png": drawing.plot_optimization_history(sweep)}
        if number > 1:
            drawn["importance.png"] = drawing.plot_param_importances(sweep)
    return {name: plots.png(axes.figure) for name, axes in drawn.items()}
