"""Lets a trained model answer with tools: it calls them, they are run, and it goes on.

    python -m tools.agent --workdir=DIR --task="what is 12*34?"
    python -m tools.agent --workdir=DIR --interactive
    python -m tools.agent --workdir=DIR --batch=tasks.jsonl --out=traces.jsonl > answers.jsonl
    ... --tools=calculator,python --functions=mine.py --sandbox=rlimits

Turns go to stdout as they end, one after the other; of each line {"task": ...} of --batch, all in
one batch, a line {"task": ..., "answer": ..., "end": ...} at the end. --out has the transcripts.
The model must have been trained on conversations (docs/agents.md).

Python runs in a sandbox. Without bubblewrap there is none that hides your files, and the tool says
so and ends; --sandbox=rlimits is for code that you would run yourself. Tools are also the functions
of a file of yours, --functions, whose parameters must be annotated; they run in this process.
"""

import argparse
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Literal

from spectral_pod import fields
from spectral_pod.agent import sandbox, traces
from spectral_pod.agent.loop import Agent, Limits
from spectral_pod.agent.protocol import Turn
from spectral_pod.agent.tools import Tools, calculator
from spectral_pod.errors import ConfigError, DataError, UserError
from spectral_pod.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Probability
from spectral_pod.generate.sampling import Sampling
from spectral_pod.parallel import runtime

from . import shell, trained_model

TOOLS = ("calculator", "python")


def main(argv: Sequence[str]) -> int:
    parser = shell.parser("agent", __doc__)
    trained_model.add_flags(parser)
    # A task may be any bytes: `type` exempts it from being Unicode.
    parser.add_argument("--task", type=str, metavar="TEXT", help="what the model is to answer")
    parser.add_place("--batch", local=True, metavar="FILE", help='a file of lines {"task": ...}')
    parser.add_argument("--interactive", action="store_true", help="a question for each line typed")
    parser.add_output("--out", "the transcripts, as traces")
    parser.add_argument("--tools", default="calculator,python", help="of calculator, python")
    parser.add_place("--functions", local=True, metavar="FILE.py", help="further tools")
    add_sandbox(parser)
    parser.add_value("--calls", NonNegative, 16, "of tools for a question, at most (16)")
    parser.add_value("--bytes", Positive, 8192, "of a transcript, at most (8192)")
    parser.add_value("--seconds", PositiveFloat, 300.0, "for a question, at most (300)")
    parser.add_value("--tool_seconds", PositiveFloat, 10.0, "for a call, at most (10)")
    parser.add_value("--tool_bytes", Positive, 2000, "of a result, at most (2000)")
    parser.add_value("--temperature", NonNegativeFloat, 0.0, "0 takes the likeliest byte (0)")
    parser.add_value("--top_k", NonNegative, 0, "sample from the k likeliest bytes; 0: all (0)")
    parser.add_value(
        "--top_p", Probability, 1.0, "sample from the likeliest bytes of this total probability"
    )
    parser.add_value("--seed", int, 0, "sampling seed (0)")
    return shell.run(parser, run, argv)


def add_sandbox(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that says how Python is confined."""
    parser.add_argument(
        "--sandbox", default="bubblewrap", choices=sandbox.MODES, help="of Python (bubblewrap)"
    )


def run(arguments: argparse.Namespace) -> None:
    runtime.initialize(None, 1, 0)
    tasks = read_tasks(arguments.task, arguments.batch, interactive=arguments.interactive)
    agent = Agent.from_checkpoint(
        arguments.workdir,
        tools_of(arguments),
        step=arguments.step,
        mesh=trained_model.mesh_of(arguments.mesh),
        dtype=arguments.dtype,
        sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p),
        seed=arguments.seed,
        limits=Limits(arguments.calls, arguments.bytes, arguments.seconds),
        listener=(lambda index, turn: None) if arguments.batch else _print,
    )
    out = open(arguments.out, "w", encoding="utf-8") if arguments.out else None  # noqa: SIM115
    try:
        converse(agent, tasks, arguments, out)
    finally:
        if out:
            out.close()


def converse(
    agent: Agent, tasks: list[bytes], arguments: argparse.Namespace, out: IO[str] | None
) -> None:
    """Has the conversations that the flags ask for, and writes them to `out`.

    Raises:
      UserError: the only task was not answered.
    """
    if arguments.interactive:
        chat(agent, sys.stdin.buffer, out)
        return
    found = agent.run(tasks)
    if out:
        out.writelines(map(traces.to_line, found))
    if arguments.batch:
        for task, trace in zip(tasks, found):
            answer = None if trace.answer is None else trace.answer.decode(errors="replace")
            line = {"task": task.decode(), "answer": answer, "end": trace.end}
            print(json.dumps(line, ensure_ascii=False), flush=True)
        answered = sum(trace.end == "answered" for trace in found)
        shell.say(f"{answered} of {len(found)} tasks answered")
    elif found[0].end != "answered":
        raise UserError(f"there is no answer: {found[0].note}")


def chat(agent: Agent, lines: IO[bytes], out: IO[str] | None) -> None:
    """A conversation with a question a line, until they end or it does; also when interrupted, it
    is written to `out`.
    """
    talk, trace = agent.chat(), None
    try:
        while trace is None or trace.end == "answered":
            sys.stderr.write("> ")
            sys.stderr.flush()
            question = lines.readline()
            if not question:
                return
            trace = talk.ask(question.rstrip(b"\r\n"))
        shell.say(f"There is no answer, and the conversation is over: {trace.note}")
    finally:
        if out and trace:
            out.write(traces.to_line(trace))


def tools_of(arguments: argparse.Namespace) -> Tools:
    """The tools that the flags name; says what a sandbox does not protect.

    Raises:
      ConfigError: there is no such tool, or a function cannot be one.
      SandboxError: code cannot be confined as asked for.
    """
    tools = Tools(seconds=arguments.tool_seconds, output_bytes=arguments.tool_bytes)
    for name in filter(None, arguments.tools.split(",")):
        fields.one_of("--tools", name, TOOLS)
        if name == "calculator":
            tools.add(calculator)
            continue
        seconds = min(arguments.tool_seconds, sandbox.Limits.seconds)
        tools.add(python_of(arguments.sandbox, seconds))
    if arguments.functions:
        for function in functions_of(arguments.functions):
            tools.add(function)
    return tools


def python_of(mode: Literal["bubblewrap", "rlimits"], seconds: float) -> Callable[[str], bytes]:
    """The tool `python`; says what its sandbox does not protect.

    Args:
      seconds: in which code must end.

    Raises:
      SandboxError: code cannot be confined as asked for.
    """
    if mode == "rlimits":
        shell.say(sandbox.UNPROTECTED)
    return sandbox.Sandbox(mode, sandbox.Limits(seconds=seconds)).python


def functions_of(file: str) -> Iterator[Callable[..., Any]]:
    """The functions that a Python file defines, but for those whose name begins with `_`.

    Raises:
      ConfigError: it cannot be imported, or defines none.
    """
    spec = importlib.util.spec_from_file_location("agent_functions", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--functions is {file!r}; it must be a file of Python, NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--functions: {file} fails: {type(error).__name__}: {error}") from error
    found = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == spec.name and name[0] != "_"
    ]
    if not found:
        raise ConfigError(f"--functions: {file} defines no functions")
    yield from found


def read_tasks(task: str | None, batch: str | None, *, interactive: bool) -> list[bytes]:
    """The tasks that the flags give.

    Raises:
      ConfigError: not exactly one of the flags is given.
      DataError: the file of tasks is malformed.
    """
    if [task is not None, batch is not None, interactive].count(True) != 1:
        raise ConfigError("give one of --task=TEXT, --batch=FILE and --interactive")
    if batch is None:
        return [] if task is None else [os.fsencode(task)]
    tasks = []
    with open(batch, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                tasks.append(json.loads(line)["task"].encode())
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(f'{batch}:{number} is not {{"task": TEXT}}') from error
    if not tasks:
        raise DataError(f"{batch} holds no tasks")
    return tasks


def _print(index: int, turn: Turn) -> None:
    """A turn as `role: text`."""
    sys.stdout.buffer.write(f"{turn.role.value}: {shell.printable(turn.data)}\n".encode())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
