"""How many of the held-out questions of the task `agent` a trained model answers exactly.

    python -m tools.agent_evaluate --workdir=DIR                    with its tools
    python -m tools.agent_evaluate --workdir=DIR --failing          which fail at their first call
    python -m tools.agent_evaluate --workdir=DIRECT                 a run of configs/agent.py:direct

The questions are those of the test split: other ranges of numbers and other ways to ask than in
training (`spectral_pod/data/tasks/agent_kinds.py`). A run with `tool=False` has no tools. Of each
group the report, JSON on stdout, has the number of `questions` and the share answered `exact`ly:

    arithmetic   what the calculator is for; by_digits (of the longer number) are parts of it
    code         what Python is for, of a run with `python` above 0
    plain        what needs no tool; `without_call` is the share that is exact without one
    by_kind      all questions, by their kind
    recovered    with --failing: the conversations in which a call failed
    ends         how conversations ended (`spectral_pod/agent/loop.py`)

The model takes the likeliest symbols, so that the same command gives the same report.
"""

import argparse
import collections
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from spectral_pod.agent import traces
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.traces import Trace
from spectral_pod.data.progress import Progress
from spectral_pod.data.tasks.agent_kinds import Question
from spectral_pod.fields import Positive
from spectral_pod.generate.restore import Trained, restore_for_inference
from spectral_pod.parallel import runtime

from . import agent, agent_questions, shell, trained_model

_SPLIT = "test"


class Asked(NamedTuple):
    """A question, and the conversation about it."""

    question: Question
    trace: Trace

    @property
    def is_exact(self) -> bool:
        return self.trace.end == "answered" and self.trace.answer == self.question.answer

    @property
    def has_call(self) -> bool:
        return any(turn.role == Role.CALL for turn in self.trace.turns)


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("agent_evaluate", __doc__)
    trained_model.add_flags(parser)
    parser.add_value("--questions", Positive, 1000, "to ask (1000)")
    parser.add_value("--batch", Positive, 64, "conversations at once (64)")
    parser.add_value("--seed", int, None, "of the questions (that of the run)")
    parser.add_value("--digits", Positive, None, "of a number, at most (those of the run)")
    agent.add_sandbox(parser)
    parser.add_argument("--failing", action="store_true", help="every first call fails")
    parser.add_output("--out", "the transcripts, as traces")
    return shell.run(parser, run, argv)


def run(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    mesh = trained_model.mesh_of(arguments.mesh)
    trained = restore_for_inference(
        arguments.workdir, step=arguments.step, mesh=mesh, dtype=arguments.dtype
    )
    seed = trained.config.seed if arguments.seed is None else arguments.seed
    asked = ask(trained, arguments, seed)
    if arguments.out:
        shell.write(arguments.out, "".join(traces.to_line(one.trace) for one in asked))
    task = agent_questions.task_of(trained, arguments.digits)
    facts = {"workdir": arguments.workdir, "step": trained.step, "split": _SPLIT, "seed": seed}
    facts |= {"digits": task.digits, "tool": task.tool, "failing": arguments.failing}
    print(json.dumps(facts | report(asked, failing=arguments.failing), indent=1))


def ask(trained: Trained, arguments: argparse.Namespace, seed: int) -> list[Asked]:
    """Asks the questions, a batch after the other."""
    task = agent_questions.task_of(trained, arguments.digits)
    tools = agent_questions.tools_of(task, arguments.sandbox)
    progress = Progress("Asking", arguments.questions, "questions")
    asked: list[Asked] = []
    while len(asked) < arguments.questions:
        records = range(len(asked), min(len(asked) + arguments.batch, arguments.questions))
        questions = agent_questions.questions_of(task, _SPLIT, seed, records)
        failures = [agent_questions.failure(i) if arguments.failing else "" for i in records]
        found = agent_questions.converse(trained, tools, questions, failures)
        asked += map(Asked, questions, found)
        progress.at(len(asked))
    progress.end()
    return asked


def report(asked: Sequence[Asked], *, failing: bool) -> dict[str, Any]:
    """The shares of exact answers, by group: see the module."""
    needing = [one for one in asked if one.question.tool == "calculator"]
    coded = [one for one in asked if one.question.tool == "python"]
    plain = [one for one in asked if not one.question.tool]
    found = {
        "questions": len(asked),
        "exact": _share(one.is_exact for one in asked),
        "arithmetic": _group(needing),
        "by_digits": _groups(needing, "digits"),
        "plain": _group(plain)
        | {"without_call": _share(one.is_exact and not one.has_call for one in plain)},
        "by_kind": _groups(asked, "kind"),
    }
    if coded:
        found["code"] = _group(coded)
    if failing:
        found["recovered"] = _group([one for one in asked if one.has_call])
    return found | {"ends": dict(collections.Counter(one.trace.end for one in asked))}


def _groups(asked: Iterable[Asked], field: str) -> dict[str, Any]:
    groups = collections.defaultdict(list)
    for one in asked:
        groups[getattr(one.question, field)].append(one)
    return {str(name): _group(groups[name]) for name in sorted(groups)}


def _group(asked: Sequence[Asked]) -> dict[str, Any]:
    return {"questions": len(asked), "exact": _share(one.is_exact for one in asked)}


def _share(flags: Iterable[bool]) -> float | None:
    """The share of true values; None of none."""
    values = list(flags)
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
