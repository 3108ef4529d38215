"""Tasks by name. `task.py` says what a task is; each of the others is in a module of its own."""

from collections.abc import Mapping
from typing import Any

from spectral_pod import fields
from spectral_pod.data.tasks.agent import AgentTask
from spectral_pod.data.tasks.agent_traces import AgentTraces
from spectral_pod.data.tasks.content_type import ContentType
from spectral_pod.data.tasks.copy import Copy
from spectral_pod.data.tasks.dna import Dna
from spectral_pod.data.tasks.listops import (
    ListOps,
    ListOpsAnswers,
    ListOpsArguments,
    ListOpsSubtrees,
)
from spectral_pod.data.tasks.lm import LanguageModelling
from spectral_pod.data.tasks.log_blocks import LogBlocks
from spectral_pod.data.tasks.mqar import Mqar
from spectral_pod.data.tasks.overwrite import Overwrite
from spectral_pod.data.tasks.pathfinder import Pathfinder
from spectral_pod.data.tasks.python_syntax import PythonSyntax
from spectral_pod.data.tasks.rag import Rag
from spectral_pod.data.tasks.recall import Recall
from spectral_pod.data.tasks.records import Records
from spectral_pod.data.tasks.retrieval import Retrieval
from spectral_pod.data.tasks.task import DrawnTask, StoredTask, Task

__all__ = ["TASKS", "DrawnTask", "StoredTask", "Task", "make"]

TASKS: dict[str, type[StoredTask] | type[DrawnTask]] = {
    "content_type": ContentType,
    "listops": ListOps,
    "listops_answers": ListOpsAnswers,
    "listops_arguments": ListOpsArguments,
    "listops_subtrees": ListOpsSubtrees,
    "pathfinder": Pathfinder,
    "retrieval": Retrieval,
    "dna": Dna,
    "python_syntax": PythonSyntax,
    "log_blocks": LogBlocks,
    "records": Records,
    "lm": LanguageModelling,
    "copy": Copy,
    "recall": Recall,
    "overwrite": Overwrite,
    "mqar": Mqar,
    "agent": AgentTask,
    "rag": Rag,
    "agent_traces": AgentTraces,
}


def make(name: str, options: Mapping[str, Any]) -> StoredTask | DrawnTask:
    """The task of a configuration: `config.data.task` with `config.data.options`.

    Raises:
      ConfigError: there is no such task, it has no such option, or a value cannot be.
    """
    fields.one_of("config.data.task", name, TASKS)
    return TASKS[name].from_options(options)
