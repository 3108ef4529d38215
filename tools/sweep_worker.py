"""A worker of `tools.sweep`: asks for trials, runs and prunes them, and writes what was found."""

import argparse
import sys
from typing import Any

import numpy as np
import optuna
from etils import epath

from spectral_pod import command_line, project_files
from spectral_pod.data import tasks
from spectral_pod.errors import ConfigError, NonFiniteError, TimeUp, UserError
from spectral_pod.lease import InUseError, Lease
from spectral_pod.validation import validate

from . import exit_codes, shell, status, sweep_report, sweep_space
from .session import Run, Runner, Task, facts, logs
from .sweep_storage import journal

_NAME = "sweep"  # of Optuna's study, the only one in its storage
_ASKED = "asked"  # the attribute that holds what the sweep was asked to search
_TRAINER = (sys.executable, "-m", "spectral_pod.main")
_RESTARTS = 3  # of a trial by a worker, for exit codes that a restart can fix
_TAIL = 15  # lines of a failed trial's output that are shown
_STARTUP = 5  # trials that nothing is pruned before
_FAILED, _PRUNED, _RUNNING = (
    optuna.trial.TrialState.FAIL,
    optuna.trial.TrialState.PRUNED,
    optuna.trial.TrialState.RUNNING,
)


def existing(out: str) -> optuna.Study:
    """The study of the sweep in `out`, to be read.

    Raises:
      ConfigError: there is none.
    """
    try:
        return optuna.load_study(study_name=_NAME, storage=journal(out))
    except KeyError:
        raise ConfigError(f"{out} is no sweep: it has no journal") from None


class _Trial:
    """A trial that this worker runs, and holds the lease of."""

    def __init__(self, trial: optuna.Trial, lease: Lease, flags: list[str], reported: int):
        self.trial, self.lease, self.flags = trial, lease, flags
        self.reported = reported  # the last step of an evaluation that Optuna knows
        self.restarts = 0
        self.is_pruned = False

    @property
    def name(self) -> str:
        return f"trial-{self.trial.number:04d}"

    def release(self) -> None:
        """Leaves the trial to whoever comes next, unless Optuna was told its end."""
        self.lease.__exit__(None, None, None)


class Worker(Runner):
    """Runs trials until there are as many as asked for.

    Args:
      arguments: of the command line.
      out: where the sweep is.
    """

    def __init__(self, arguments: argparse.Namespace, out: str):
        super().__init__(
            logs(out), budget_minutes=arguments.budget_minutes, jobs=arguments.jobs, waits=False
        )
        self._out, self._number, self._seed = out, arguments.trials, arguments.seed
        self._spaces = sweep_space.parse(arguments.vary) or sweep_space.DEFAULT
        self._base = [f"--config={arguments.base}", "--config.train.eval_split=validation"]
        self._flags = list(arguments.flags)
        objective = self._objective()
        self._metric, self._higher = objective.ranked_by, objective.higher_is_better
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        startup = _STARTUP if arguments.pruner == "median" else sys.maxsize
        self._study = optuna.create_study(
            storage=journal(out),
            study_name=_NAME,
            load_if_exists=True,
            direction="maximize" if self._higher else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=startup),
        )
        self._check_asked()
        self._again: list[_Trial] = []  # that a restart may fix
        self._mine: set[int] = set()  # numbers of trials that this worker runs or has run

    def _objective(self) -> Any:
        """The objective of the configuration that is varied; also checks all spaces.

        Raises:
          ConfigError: it is invalid, or a field or one of its values is.
        """
        fixed = {flag.partition("=")[0].lstrip("-") for flag in self._flags}
        for space in self._spaces:
            if f"config.{space.field}" in fixed:
                raise ConfigError(
                    f"--vary={space}: --config.{space.field} after -- gives all trials one value; "
                    "leave out one of the two"
                )
        ends = [space.ends() for space in self._spaces]
        for i in range(2):
            flags = [f"--config.{s.field}={end[i]}" for s, end in zip(self._spaces, ends)]
            config = self._config(flags)
        return tasks.make(config.data.task, config.data.options).objective

    def _config(self, flags: list[str]) -> Any:
        flags = [*self._base, f"--workdir={self._out}/check", *flags, *self._flags]
        return command_line.parse_trainer(flags).config.value

    def _check_asked(self) -> None:
        """Raises a ConfigError if the sweep in `out` was asked to search something else."""
        asked: dict[str, Any] = {"config": self._base[0], "flags": self._flags}
        asked["vary"] = [str(space) for space in self._spaces]
        held = self._study.user_attrs.get(_ASKED)
        if held is None:
            self._study.set_user_attr(_ASKED, asked)
        elif held != asked:
            raise ConfigError(f"{self._out} is a sweep of {held}; give these, or another --out")

    def run(self) -> int:
        """Runs trials, and prints and writes what was found; returns the exit code."""
        try:
            self.work()
        finally:
            for held in (*(run.task.subject for run in self.running), *self._again):
                held.release()
            sweep_report.write(self._study, self._out)
            print(sweep_report.table(self._study), end="", flush=True)
        trials = self._study.get_trials(deepcopy=False)
        ended = sum(trial.state.is_finished() for trial in trials)
        if self.budget_ended and ended < self._number:
            shell.say(f"The budget ended; {ended} of {self._number} trials have ended")
            return TimeUp.exit_code
        if all(trial.state == _FAILED for trial in trials):
            raise ConfigError("no trial has a result; see above for the reasons")
        return 0

    def next(self) -> Task | None:
        while (found := self._again.pop(0) if self._again else self._claimed()) is not None:
            workdir = f"--workdir={self._out}/{found.name}"
            command = [*_TRAINER, *self._base, workdir, *found.flags, *self._flags]
            try:
                validate(self._config(found.flags))
            except UserError as error:
                self._tell(found, _FAILED, f"failed: {error}")
                continue
            position = f"[{found.trial.number + 1} of {self._number}]"
            shell.say(f"{position} {found.name}: {' '.join(found.flags)}")
            return Task(found, found.name, position, command)
        return None

    def _claimed(self) -> _Trial | None:
        """A trial that was interrupted, or a new one if there are not enough."""
        # One worker at a time decides, so that there are as many trials as asked for.
        with Lease(f"{self._out}/claims/next.json", f"sweep {self._out}", wait=True):
            trials = self._study.get_trials(deepcopy=False)
            for frozen in trials:
                if frozen.state == _RUNNING and frozen.number not in self._mine:
                    trial = optuna.trial.Trial(self._study, frozen._trial_id)
                    try:
                        return self._made(trial, max(frozen.intermediate_values, default=-1))
                    except InUseError:  # by the worker that runs it
                        continue
            if len(trials) >= self._number:
                return None
            return self._made(self._study.ask())

    def _made(self, trial: optuna.Trial, reported: int = -1) -> _Trial:
        name = f"trial {trial.number}"
        lease = Lease(f"{self._out}/claims/{trial.number:04d}.json", f"{name} of {self._out}")
        lease.__enter__()
        self._mine.add(trial.number)
        self._study.sampler = self._sampler(trial.number)
        flags = [f"--config.{space.field}={space.suggest(trial)}" for space in self._spaces]
        return _Trial(trial, lease, flags, reported)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Proposes the values of one trial.

        What it draws depends on the seed and the number of the trial alone: one sampler for all
        would start again with every worker, and two workers would try the same values.
        """
        seed = np.random.SeedSequence((self._seed, number)).generate_state(1)[0]
        # Workers do not see each other's running trials unless these count as bad ones.
        return optuna.samplers.TPESampler(seed=int(seed), constant_liar=True)

    def look(self, run: Run) -> None:
        found: _Trial = run.task.subject
        found.lease.check()
        if self._report(found) and not found.is_pruned:
            found.is_pruned = True
            run.say("is pruned: it is worse than the median of the others at this step")
            run.terminate()

    def _report(self, found: _Trial) -> bool:
        """Tells Optuna of new evaluations; returns whether the trial is to be pruned."""
        file = epath.Path(self._out) / found.name / "metrics.jsonl"
        name = f"validation/{self._metric}"
        to_prune = False
        for line in project_files.Log(file, project_files.METRICS).lines:
            if name in line and line["step"] > found.reported:
                found.reported = int(line["step"])
                found.trial.report(line[name], found.reported)
                to_prune = found.trial.should_prune()
        return to_prune

    def finish(self, run: Run) -> None:
        found: _Trial = run.task.subject
        self._report(found)
        result = epath.Path(self._out) / found.name / "result.json"
        if result.exists():
            evaluation = project_files.RESULT.read(result)["eval"]
            value = float(evaluation[self._metric])  # type: ignore[literal-required]
            self._tell(found, None, f"{self._metric} {value:.4f}", value)
        elif found.is_pruned:
            self._tell(found, _PRUNED, f"pruned at step {found.reported:,}")
        elif run.code == NonFiniteError.exit_code:
            self._tell(found, _PRUNED, "its numbers went bad")
        elif self.budget_ended and exit_codes.is_curable(run.code):
            found.release()
        elif exit_codes.is_curable(run.code) and found.restarts < _RESTARTS:
            found.restarts += 1
            run.say(f"{exit_codes.meaning(run.code)}; it is started again")
            self._again.append(found)
        else:
            for line in run.output()[-_TAIL:]:
                shell.say(f"    {line}")
            self._tell(found, _FAILED, f"failed with exit code {run.code}")

    def _tell(self, found: _Trial, state: Any, said: str, value: float | None = None) -> None:
        if state == _FAILED:
            found.trial.set_user_attr("fault", said)
        self._study.tell(found.trial, value, state=state)
        found.release()
        shell.say(f"[{found.trial.number + 1} of {self._number}] {found.name}: {said}")

    def progress(self, run: Run) -> str:
        known = facts(f"{self._out}/{run.task.name}")
        if known is None or known["eta_seconds"] is None:
            return "no metrics yet"
        trials = self._study.get_trials(deepcopy=False)
        ended = sum(trial.state.is_finished() for trial in trials)
        text = f"step {known['step']:,} of {known['total_steps']:,}"
        return (
            f"{text}, done in {status.duration(known['eta_seconds'])}; "
            f"{ended} of {self._number} trials have ended"
        )
