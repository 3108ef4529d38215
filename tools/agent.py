"""Lets a trained model answer with tools: it calls them, they are run, and it goes on.

    python -m tools.agent --workdir=DIR --task="what is 12*34?"
    python -m tools.agent --workdir=DIR --interactive
    python -m tools.agent --workdir=DIR --batch=tasks.jsonl --out=traces.jsonl > answers.jsonl
    ... --tools=calculator,python --functions=mine.py --sandbox=rlimits

Turns go to stdout as they end, as `role: text` with further lines indented; of each line
{"task": ...} of --batch, all in one batch, a line {"task": ..., "answer": ..., "end": ...} at the
end. --out has the transcripts, also of what was interrupted. The model must have been trained on
conversations (docs/agents.md).

Python runs in a sandbox. Without bubblewrap there is none that hides your files, and the tool says
so and ends; --sandbox=rlimits is for code that you would run yourself. Tools are also the functions
of a file of yours, --functions, whose parameters must be annotated; they run in this process, and
what they print goes to stderr.
"""

import argparse
import contextlib
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
from spectral_pod.agent.traces import Trace
from spectral_pod.errors import ConfigError, UserError
from spectral_pod.fields import NonNegative, NonNegativeFloat, Positive, PositiveTime, Probability
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
    parser.add_value("--seconds", PositiveTime, 300.0, "for a question, at most (300)")
    parser.add_value("--tool_seconds", PositiveTime, 10.0, "for a call, at most (10)")
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
    )
    converse(agent, tasks, arguments)


def converse(agent: Agent, tasks: list[bytes], arguments: argparse.Namespace) -> None:
    """Has the conversations that the flags ask for.

    Raises:
      UserError: a question was not answered.
    """
    stdout, heard = sys.stdout.buffer, dict[int, list[Turn]]()

    def listen(index: int, turn: Turn) -> None:
        heard.setdefault(index, []).append(turn)
        if not arguments.batch:
            _print(turn, stdout)

    agent.listener, found = listen, list[Trace]()
    try:
        # What a tool of --functions prints is neither a turn nor an answer.
        with contextlib.redirect_stdout(sys.stderr):
            found = chat(agent, sys.stdin.buffer) if arguments.interactive else agent.run(tasks)
    finally:  # also when interrupted
        found = found or [Trace(tuple(turns)) for _, turns in sorted(heard.items())]
        if arguments.out and found:
            shell.write(arguments.out, "".join(map(traces.to_line, found)))
    if arguments.batch:
        _print_answers(tasks, found, stdout)
    elif found and found[0].end != "answered":
        more = "; --bytes allows more" if _may_have_more(agent, found[0], arguments.bytes) else ""
        raise UserError(f"there is no answer: {found[0].note}{more}")


def _may_have_more(agent: Agent, trace: Trace, asked: int) -> bool:
    return trace.end == "bytes" and agent.limits.bytes == asked  # not the model's own limit


def _print_answers(tasks: list[bytes], found: list[Trace], stdout: IO[bytes]) -> None:
    """A line of JSON for each task."""
    for task, trace in zip(tasks, found):
        answer = None if trace.answer is None else trace.answer.decode(errors="replace")
        line = {"task": task.decode(), "answer": answer, "end": trace.end}
        stdout.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
    stdout.flush()
    answered = sum(trace.end == "answered" for trace in found)
    shell.say(f"{answered} of {len(found)} tasks answered")


def chat(agent: Agent, lines: IO[bytes]) -> list[Trace]:
    """A conversation with a question a line, until they end or it does; none without a question."""
    talk, trace = agent.chat(), None
    while trace is None or trace.end == "answered":
        sys.stderr.write("> ")
        sys.stderr.flush()
        question = lines.readline()
        if not question:
            break
        trace = talk.ask(question.rstrip(b"\r\n"))
    return [trace] if trace else []


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
            try:
                tools.add(function)
            except ConfigError as error:
                raise ConfigError(f"--functions: {arguments.functions}: {error}") from error
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
    sys.modules[spec.name] = module  # dataclasses look there for what annotations name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--functions: {file} fails: {type(error).__name__}: {error}") from error
    found = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == spec.name and name[0] != "_"
    ]
    if not found:
        raise ConfigError(f"--functions: {file} defines no functions")
    yield from dict.fromkeys(found)  # one may have two names


def read_tasks(task: str | None, batch: str | None, *, interactive: bool) -> list[bytes]:
    """The tasks that the flags give.

    Raises:
      ConfigError: not exactly one of the flags is given.
      DataError: the file of tasks is malformed.
    """
    if [task is not None, batch is not None, interactive].count(True) != 1:
        raise ConfigError("give one of --task=TEXT, --batch=FILE and --interactive")
    if batch is not None:
        return shell.read_texts(batch, "task")
    return [] if task is None else [os.fsencode(task)]


def _print(turn: Turn, stdout: IO[bytes]) -> None:
    """A turn as `role: text`, whose further lines are indented."""
    stdout.write(f"{turn.role.value}: {shell.indented(turn.data)}\n".encode())
    stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
