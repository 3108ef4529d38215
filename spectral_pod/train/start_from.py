"""A run that starts from the parameters of another one, as in fine-tuning: `train.start_from`.

Its step is 0, and its optimizer, its schedule and its data are its own. It keeps a checkpoint of
step 0, so that it reads the other run once: a restart goes on from what it has saved itself.
"""

import json
from typing import Any

from etils import epath

from spectral_pod import config as config_lib
from spectral_pod import project_files, storage
from spectral_pod.config import Config
from spectral_pod.errors import CheckpointError, ConfigError, DataError
from spectral_pod.generate.restore import recorded_config
from spectral_pod.parallel import runtime
from spectral_pod.train.sealed_steps import SealedSteps
from spectral_pod.train.state import check_finite

_FIELD = "config.train.start_from"


def parameters(config: Config, abstract_params: Any) -> tuple[Any, project_files.Origin]:
    """The parameters of the newest sound step of the run `config.train.start_from`.

    They are the average if that run keeps one: what is evaluated and used. All processes must call
    it, and the leader chooses the step.

    Args:
      abstract_params: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto.

    Returns:
      float32 parameters, and what is recorded about where they are from.

    Raises:
      ConfigError: there is no run, or the processes see different ones.
      CheckpointError: it has no sound checkpoint, or its model has parameters of other names or
        shapes.
      NonFiniteError: a parameter is NaN or infinite.
    """
    workdir = storage.place(config.train.start_from, _FIELD)
    storage.check_access(workdir, write=False)
    file = epath.Path(workdir) / "config.json"
    if not file.exists():
        raise ConfigError(f"{_FIELD} is {workdir!r}, which is no workdir of a run: it has no "
                          "config.json")  # fmt: skip
    try:
        recorded = project_files.RUN.read(file)
        theirs = recorded_config(recorded["config"], str(file))
        run = project_files.run_id(recorded)
        runtime.compare("the run to start from", {f"the run in {workdir}": run})
        saved = SealedSteps(f"{workdir}/checkpoints", run)
        step, params = saved.newest_params(abstract_params, averaged=theirs.optimizer.average > 0)
    except (CheckpointError, DataError) as error:
        raise type(error)(f"{_FIELD}: {error}") from error
    check_finite(params, f"checkpoint {saved.directory / str(step)}")
    return params, {
        "workdir": workdir,
        "run": run,
        "step": step,
        "differences": _differences(theirs, config),
    }


def report(origin: project_files.Origin) -> str:
    """A line on where the parameters are from, and in what the models differ beside them."""
    other = "".join(f"; {line}" for line in origin["differences"])
    return f"parameters of step {origin['step']} of {origin['workdir']}{other}"


def _differences(theirs: Config, ours: Config) -> list[str]:
    """In what two models differ whose parameters have the same shapes."""

    def fields(config: Config) -> dict[str, Any]:
        return config_lib.flat(json.loads(json.dumps(config_lib.to_dict(config)["model"])))

    there, here = fields(theirs), fields(ours)
    return [
        f"config.model.{name} is {there[name]!r} there, and {here[name]!r} here"
        for name in sorted(here)
        if there[name] != here[name]
    ]
