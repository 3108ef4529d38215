"""What the tools that ask agents generated questions share: the questions, with their answers, and
conversations in which a tool fails at its first call.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from spectral_pod.agent.loop import Agent, Limits
from spectral_pod.agent.tools import Tools, calculator
from spectral_pod.agent.traces import Trace
from spectral_pod.agent.writer import GREEDY, ModelWriter
from spectral_pod.data import tasks
from spectral_pod.data.drawn import generator
from spectral_pod.data.tasks.agent import FAILURES, AgentTask
from spectral_pod.data.tasks.agent_kinds import Question
from spectral_pod.data.tasks.agent_traces import AgentTraces
from spectral_pod.errors import ConfigError
from spectral_pod.generate.restore import Trained
from spectral_pod.generate.sampling import Sampling

from . import agent

_CALLS = 8  # of tools in a conversation, at most
# For a batch, and for code: what is found is not to depend on the machine.
_SECONDS, _CODE_SECONDS = 1e8, 600.0


def task_of(trained: Trained, digits: int | None) -> AgentTask:
    """The task `agent` whose questions a model is asked: that of its run.

    A run of `agent_traces` has learned from conversations alone, and is asked as by default.

    Args:
      digits: of a number, at most, in place of the task's own.

    Raises:
      ConfigError: the run was trained on another task.
    """
    data = trained.config.data
    if data.task not in (AgentTask.name, AgentTraces.name):
        raise ConfigError(
            f"the run was trained on {data.task!r}; these questions are for runs of the tasks "
            f"{AgentTask.name!r} and {AgentTraces.name!r} (configs/agent.py)"
        )
    task = tasks.make(data.task, data.options)
    asked = task if isinstance(task, AgentTask) else AgentTask()
    return dataclasses.replace(asked, digits=digits) if digits else asked


def questions_of(task: AgentTask, split: str, seed: int, records: range) -> list[Question]:
    """The questions of these examples of a split; those of a run's seed are its own."""
    return [task.question(split, generator(seed, split, record)) for record in records]


def tools_of(task: AgentTask, mode: Literal["bubblewrap", "rlimits"]) -> Tools:
    """The tools that the task's questions need.

    Args:
      mode: how Python is confined, if they need it.
    """
    tools = Tools(seconds=_CODE_SECONDS)
    if task.tool:
        tools.add(calculator)
        if task.python:
            tools.add(agent.python_of(mode, _CODE_SECONDS))
    return tools


def converse(
    trained: Trained,
    tools: Tools,
    questions: Sequence[Question],
    failures: Sequence[str],
    *,
    seed: int = 0,
    sampling: Sampling = GREEDY,
) -> list[Trace]:
    """A conversation about each of the questions, in one batch.

    Args:
      failures: of each conversation what its first call has as its result; "" is the tool's own.
      seed: of what is sampled.
    """
    agent = _Failing(
        ModelWriter(trained, sampling=sampling, seed=seed),
        tools,
        failures=failures,
        limits=Limits(_CALLS, trained.config.data.seq_len, _SECONDS),
    )
    return agent.run([question.text for question in questions])


def failure(number: int) -> str:
    """One of the failures that the task has."""
    return FAILURES[number % len(FAILURES)]


class _Failing(Agent):
    """An agent whose tools may fail when a conversation first calls one."""

    def __init__(self, *arguments: Any, failures: Sequence[str], **options: Any):
        super().__init__(*arguments, **options)
        self._failures = [text.encode() for text in failures]  # that are still to come

    def results(self, calls: Sequence[tuple[int, bytes]], seconds: float) -> list[bytes]:
        """See `Agent.results`."""
        failed = {index: self._failures[index] for index, _ in calls if self._failures[index]}
        for index in failed:
            self._failures[index] = b""
        others = [call for call in calls if call[0] not in failed]
        found = dict(zip([index for index, _ in others], super().results(others, seconds)))
        return [(failed | found)[index] for index, _ in calls]
