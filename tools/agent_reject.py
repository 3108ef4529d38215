"""Trains an agent further on its own conversations, those that are right: rejection sampling.

    python -m tools.agent_reject --workdir=DIR --out=FOLDER
    python -m tools.agent_evaluate --workdir=FOLDER/run             compare with --workdir=DIR

The model of DIR is asked questions of the training split of the task `agent`, several times each,
at a temperature. A conversation is kept if its answer is right, and is the result of its last call;
if each call before that had an error for its result; and if there is no call where none is needed.
Then a new run, FOLDER/run, starts from the parameters of DIR and trains on what was kept, mixed
with generated conversations; its validation is of generated ones with held-out numbers.

FOLDER is on disk or gs://. It has samples/ with all conversations, training.jsonl and
validation.jsonl with those that are trained on, and data/ with their store. The same command goes
on where it was interrupted. A report, JSON, goes to stdout at the end.
"""

import argparse
import collections
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from spectral_pod import config as config_lib
from spectral_pod import project_files, storage
from spectral_pod.agent import traces
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.traces import Trace
from spectral_pod.config import Config
from spectral_pod.data.drawn import generator
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks.agent import AgentTask
from spectral_pod.data.tasks.agent_kinds import Question
from spectral_pod.errors import ConfigError, DataError
from spectral_pod.fields import Fraction, NonNegativeFloat, Positive, PositiveFloat
from spectral_pod.generate.restore import Trained, restore_for_inference
from spectral_pod.generate.sampling import Sampling
from spectral_pod.parallel import runtime
from spectral_pod.train import loop
from spectral_pod.train.sealed_steps import SealedSteps

from . import agent, agent_questions, shell

KEPT = "kept"
_RATE = 0.1  # of the run's learning rates, by default


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("agent_reject", __doc__)
    parser.add_place("--workdir", required=True, help="of the run: a folder or a gs:// URL")
    parser.add_place("--out", required=True, help="the folder of what is made")
    parser.add_value("--questions", Positive, 2000, "to ask (2000)")
    parser.add_value("--samples", Positive, 4, "conversations about each of them (4)")
    parser.add_value("--temperature", PositiveFloat, 1.0, "of what the model writes (1)")
    parser.add_value("--digits", Positive, None, "of a number, at most (those of the run)")
    parser.add_value("--batch", Positive, 64, "conversations at once (64)")
    parser.add_value("--seed", int, 1, "of questions and samples; not that of the run (1)")
    parser.add_value("--generated", Fraction, 0.5, "the share of generated conversations (0.5)")
    parser.add_value("--steps", Positive, 500, "to train (500)")
    parser.add_value("--learning_rate", NonNegativeFloat, None, "(a tenth of the run's)")
    agent.add_sandbox(parser)
    again = "Interrupted; the same command goes on"
    return shell.run(parser, run, argv, interrupted=again)


def run(arguments: argparse.Namespace) -> None:
    storage.check_access(arguments.workdir, write=False)
    storage.check_access(arguments.out, write=True)
    runtime.preemption.listen()
    runtime.initialize(None, 1, 0)
    out = epath.Path(arguments.out)
    trained, asked = begin(arguments, out)
    task = agent_questions.task_of(trained, arguments.digits)
    if not task.tool:
        raise ConfigError(f"{arguments.workdir} was trained without a tool; it has nothing to call")
    questions = agent_questions.questions_of(
        task, "train", arguments.seed, range(arguments.questions)
    )
    found = sample(trained, task, questions, arguments, out / "samples")
    kept, reasons = keep(questions, found, arguments.samples)
    if not kept:
        raise DataError(f"of {len(found)} conversations none can be kept: {_counted(reasons)}; "
                        "train the model for longer first")  # fmt: skip
    shell.say(f"{len(kept)} different conversations of {len(found)} to train on: "
              f"{_counted(reasons)}")  # fmt: skip
    made = write(task, kept, arguments, trained.config.train.eval_records, out)
    config = config_of(trained, arguments, out)
    if not (out / "run/config.json").exists():
        _check_step(arguments.workdir, trained.step)
    with contextlib.redirect_stdout(sys.stderr):
        result = loop.run(config, f"{arguments.out}/run")
    facts = {"run": f"{arguments.out}/run", "from_step": trained.step, "sampled": len(found)}
    facts |= {"verdicts": reasons, "distinct": len(kept), "generated": made}
    print(json.dumps({**facts, "asked": asked, "eval": result["eval"]}, indent=1))


def begin(
    arguments: argparse.Namespace, out: epath.Path
) -> tuple[Trained, project_files.Rejection]:
    """The model, and what it is asked: what an interrupted command has recorded, or a new record.

    Raises:
      ConfigError: the folder is of another command.
    """
    file, held = out / "asked.json", None
    if file.exists():
        held = project_files.REJECTION.read(file)
    trained = restore_for_inference(arguments.workdir, step=held["step"] if held else None)
    recorded = project_files.RUN.read(epath.Path(arguments.workdir) / "config.json")
    asked: project_files.Rejection = {
        "run": project_files.run_id(recorded),
        "step": trained.step,
        "questions": arguments.questions,
        "samples": arguments.samples,
        "temperature": arguments.temperature,
        "digits": agent_questions.task_of(trained, arguments.digits).digits,
        "batch": arguments.batch,
        "seed": arguments.seed,
        "generated": arguments.generated,
    }
    if held is None:
        out.mkdir(parents=True, exist_ok=True)
        project_files.REJECTION.write(file, asked)
    elif held != asked:
        different = [f"{k} {held[k]!r} there, {x!r} now" for k, x in asked.items() if held[k] != x]  # type: ignore[literal-required]
        raise ConfigError(
            f"{out} was begun otherwise ({'; '.join(different)}); give the same flags, or another "
            "--out"
        )
    return trained, asked


def sample(
    trained: Trained,
    task: AgentTask,
    questions: Sequence[Question],
    arguments: argparse.Namespace,
    folder: epath.Path,
) -> list[Trace]:
    """`samples` conversations about each question, one after the other; written a batch at a time.

    As in the task, in a share of them the tool fails at its first call.
    """
    total = len(questions) * arguments.samples
    tools = agent_questions.tools_of(task, arguments.sandbox)
    progress, found = Progress("Sampling", total, "conversations"), list[Trace]()
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, total, arguments.batch)):
        file = folder / f"{number:06d}.jsonl"
        places = range(start, min(start + arguments.batch, total))
        if not file.exists():
            rng = generator(arguments.seed, "validation", number)  # of no question
            conversations = agent_questions.converse(
                trained,
                tools,
                [questions[place // arguments.samples] for place in places],
                [agent_questions.failure(p) if rng.random() < task.failing else "" for p in places],
                seed=int(rng.integers(1 << 31)),
                sampling=Sampling(arguments.temperature),
            )
            storage.write_whole(file, "".join(map(traces.to_line, conversations)))
        batch = list(traces.read(str(file)))
        asked = [questions[place // arguments.samples].text for place in places]
        if [trace.turns[0].data for trace in batch] != asked:
            raise DataError(f"{file} has other conversations than were sampled; delete it, and the "
                            "same command samples them again")  # fmt: skip
        found += batch
        progress.at(len(found))
    progress.end()
    return found


def keep(
    questions: Sequence[Question], found: Sequence[Trace], samples: int
) -> tuple[list[Trace], dict[str, int]]:
    """The different conversations that are right, and how many had each verdict."""
    verdicts = [verdict(questions[i // samples], trace) for i, trace in enumerate(found)]
    kept = {trace.turns: trace for trace, one in zip(found, verdicts) if one == KEPT}
    return list(kept.values()), dict(collections.Counter(verdicts))


def verdict(question: Question, trace: Trace) -> str:
    """`KEPT`, or why a conversation is not one to learn from."""
    results = [turn.data for turn in trace.turns if turn.role == Role.RESULT]
    if trace.end != "answered":
        return "no answer"
    if trace.answer != question.answer:
        return "wrong answer"
    if bool(results) > bool(question.call):
        return "needless call"
    if not results:
        return "guessed" if question.call else KEPT
    if results[-1] != question.result:
        return "guessed"
    is_needed = all(result.startswith(b"error: ") for result in results[:-1])
    return KEPT if is_needed else "needless call"


def write(
    task: AgentTask,
    kept: Sequence[Trace],
    arguments: argparse.Namespace,
    validation: int,
    out: epath.Path,
) -> int:
    """Writes what is trained on, and a validation split; returns how many are generated."""
    number = round(len(kept) * arguments.generated / (1 - arguments.generated))

    def generated(split: str, count: int) -> list[Trace]:
        # Behind the questions that were asked, of which there may be as many in this split.
        first = arguments.questions
        rngs = (generator(arguments.seed, split, first + i) for i in range(count))
        return [Trace(tuple(task.conversation(split, rng)[0])) for rng in rngs]

    splits = {
        "training": [*kept, *generated("train", number)],
        "validation": generated("validation", validation),
    }
    for name, conversations in splits.items():
        storage.write_whole(out / f"{name}.jsonl", "".join(map(traces.to_line, conversations)))
    return number


def config_of(trained: Trained, arguments: argparse.Namespace, out: epath.Path) -> Config:
    """The configuration of the new run: that of the run, but for its data and its schedule."""
    c: Any = config_lib.copy(trained.config)
    c.data.task, c.data.stores, c.data.train_records = "agent_traces", (), 0
    c.data.options = config_lib.ConfigDict(
        {"train": f"{out}/training.jsonl", "validation": f"{out}/validation.jsonl"}
    )
    c.data.dir = f"{out}/data"
    c.train.start_from, c.train.total_steps = arguments.workdir, arguments.steps
    c.train.eval_split = "validation"
    c.train.eval_every_steps = c.checkpoint.every_steps = max(1, arguments.steps // 4)
    rate = arguments.learning_rate
    for field in ("learning_rate", "dynamics_learning_rate"):
        c.optimizer[field] = _RATE * c.optimizer[field] if rate is None else rate
    c.optimizer.warmup_steps = max(1, arguments.steps // 10)
    config: Config = c
    return config


def _check_step(workdir: str, step: int) -> None:
    """Raises a ConfigError if the run has a newer step than the one that was asked."""
    newest = SealedSteps(f"{workdir}/checkpoints").latest_sound_step
    if newest != step:
        raise ConfigError(
            f"{workdir} has a checkpoint of step {newest} now, and step {step} was sampled; give "
            "another --out once its training has ended"
        )


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(reasons.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
