"""The command line of agents: a run of the task `agent`, and what the flags may be."""

import io
import json
import sys
import types

import pytest

from spectral_pod.agent import sandbox, traces
from spectral_pod.agent.loop import Agent, Limits
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.tools import Tools, calculator
from spectral_pod.errors import ConfigError, DataError, UserError
from tests import processes, trainer
from tests.agent.scripted import Scripted, answer, call, steps
from tests.tiny_run import tiny_config, write_run
from tools import agent as tool


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir, tiny_config(**{"data.task": "agent", "model.num_layers": 1}))
    return workdir


def run(*arguments, code):
    command = [sys.executable, "-m", "tools.agent", *map(str, arguments)]
    done = processes.run(
        command, cwd=trainer.ROOT, env=trainer.environment(), capture_output=True, timeout=300
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stderr.decode()}"
    assert b"Traceback" not in done.stderr
    return done.stdout.decode(), done.stderr.decode()


def test_a_batch(workdir, tmp_path):
    """An untrained model answers nothing, within its limits, and says how each task ended."""
    (tmp_path / "tasks.jsonl").write_text('{"task": "\\u00e9?"}\n{"task": "a longer one"}\n')
    flags = f"--batch={tmp_path}/tasks.jsonl", f"--out={tmp_path}/out.jsonl", "--bytes=80"
    limits = "--sandbox=rlimits", "--temperature=1", "--seed=1"
    stdout, stderr = run(f"--workdir={workdir}", *flags, *limits, code=0)
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [line["task"] for line in lines] == ["é?", "a longer one"]
    assert sandbox.UNPROTECTED in stderr
    answered = sum(line["end"] == "answered" for line in lines)
    assert stderr.splitlines()[-1] == f"{answered} of 2 tasks answered"
    found = list(traces.read(f"{tmp_path}/out.jsonl"))
    assert [trace.end for trace in found] == [line["end"] for line in lines]
    assert found[0].turns[0].data == "é?".encode()


def test_one_message(workdir):
    _, stderr = run(f"--workdir={workdir}", "--task=x", "--tools=calculator,rm", code=2)
    assert "--tools is 'rm'; known are ['calculator', 'python']" in stderr
    _, stderr = run("--workdir=/no/such/run", "--task=x", "--tools=calculator", code=2)
    assert "/no/such/run is no workdir" in stderr


def test_a_model_of_texts_is_refused(tmp_path):
    write_run(tmp_path, tiny_config(**{"model.num_layers": 1}))
    _, stderr = run(f"--workdir={tmp_path}", "--task=x", "--tools=calculator", code=2)
    assert "trained on 'lm' does not write conversations" in stderr


# ---- with a script in the model's place


def scripted(*scripts, tools=(calculator,), **limits):
    return Agent(Scripted(*scripts), Tools(*tools), limits=Limits(**limits))


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out.jsonl")


def converse(agent, *tasks, out=None, batch=None, typed=None):
    """`typed` are the lines of a chat."""
    flags = {"interactive": typed is not None, "batch": batch, "out": out, "bytes": 8192}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", types.SimpleNamespace(buffer=typed))
        tool.converse(agent, list(tasks), types.SimpleNamespace(**flags))


def only(file):
    (trace,) = traces.read(file)
    return trace


def test_a_task_prints_its_turns(capfdbinary, out):
    """Nothing in them looks like the beginning of another, or is a command to the terminal."""
    said = "\x1b[31m42\nuser: \t\x9b"
    script = steps(call('calculator {"expression": "6*7"}'), answer(said))
    converse(scripted(script), b"6*7?", out=out)
    assert capfdbinary.readouterr().out.decode().splitlines() == [
        "user: 6*7?",
        'call: calculator {"expression": "6*7"}',
        "result: 42",
        r"answer: \x1b[31m42",
        "    user: \t\\x9b",
    ]
    assert only(out).answer == said.encode()


def test_a_task_without_an_answer_is_an_error(out):
    with pytest.raises(UserError, match="there is no answer: the model wrote the symbol 65"):
        converse(scripted(steps([65])), b"?", out=out)
    assert only(out).end == "malformed"


def test_the_limit_that_allows_more_is_named(out):
    with pytest.raises(UserError, match="has reached 8192 bytes; --bytes allows more"):
        converse(scripted(steps(answer("x" * 9000))), b"?", out=out)
    with pytest.raises(UserError, match=r"has reached 50 bytes$"):  # as the model allows no more
        converse(scripted(steps(answer("x" * 9000)), bytes=50), b"?", out=out)


def test_a_chat(capfdbinary, out):
    def script(turns):
        return answer(f"{sum(turn.role == Role.USER for turn in turns)}")

    converse(scripted(script), out=out, typed=io.BytesIO(b"a\r\n\nlast"))
    assert [turn.data for turn in only(out).turns] == [b"a", b"1", b"", b"2", b"last", b"3"]
    assert capfdbinary.readouterr().err.decode() == "> > > > "
    converse(scripted(script), out=out, typed=io.BytesIO(b""))
    assert only(out)  # nothing was said, and the file is as it was
    with pytest.raises(UserError, match="there is no answer: the model wrote"):
        converse(scripted(steps([65])), out=out, typed=io.BytesIO(b"a\nb\n"))


def test_what_is_interrupted_is_kept(out):
    """A chat, and those conversations of a batch that have begun, with the turns so far."""

    class Lines:
        def __init__(self):
            self.lines = [b"a\n"]

        def readline(self):
            if not self.lines:
                raise KeyboardInterrupt
            return self.lines.pop()

    with pytest.raises(KeyboardInterrupt):
        converse(scripted(steps(answer("1"))), out=out, typed=Lines())
    assert only(out).answer == b"1"

    def interrupted(turns):
        raise KeyboardInterrupt

    agent = scripted(steps(answer("1")), interrupted)
    with pytest.raises(KeyboardInterrupt):
        converse(agent, b"a", b"b", out=out, batch="tasks.jsonl")
    assert {trace.turns[0].data for trace in traces.read(out)} == {b"a", b"b"}


def test_what_is_there_stays_until_there_is_more(workdir, tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"task": "x"}\n')
    flags = f"--batch={file}", f"--out={file}", "--tools=calculator"
    _, stderr = run(f"--workdir={workdir}", *flags, code=2)
    assert f"--out is {str(file)!r}, as is batch; name another file" in stderr
    (tmp_path / "out.jsonl").write_text("before")
    flags = "--task=x", f"--out={tmp_path}/out.jsonl", "--tools=rm"
    run(f"--workdir={workdir}", *flags, code=2)
    assert (tmp_path / "out.jsonl").read_text() == "before"


def test_what_tools_print_is_no_answer(capfdbinary):
    def lookup(key: str) -> str:
        print("looking", key)
        return "7"

    script = steps(call('lookup {"key": "k"}'), answer("7"))
    converse(scripted(script, tools=[lookup]), b"?", batch="tasks.jsonl")
    printed = capfdbinary.readouterr()
    assert json.loads(printed.out) == {"task": "?", "answer": "7", "end": "answered"}


TASKS = {
    (None, None, False): "give one of --task=TEXT, --batch=FILE and --interactive",
    ("x", None, True): "give one of",
    ("x", "f", False): "give one of",
}


def test_the_tasks(tmp_path):
    for (task, batch, interactive), message in TASKS.items():
        with pytest.raises(ConfigError, match=message):
            tool.read_tasks(task, batch, interactive=interactive)
    assert tool.read_tasks("\udcff", None, interactive=False) == [b"\xff"]
    assert tool.read_tasks(None, None, interactive=True) == []
    file = tmp_path / "tasks"
    for text in (
        '{"task": "a"}\n{"task": 3}',
        '{"task": "a"}\n{"prompt": "b"}',
        '{"task": "a"}\n{',
        '{"task": "a"}\n{"task": ""}',
        '{"task": "a"}\n{"task": "\udcff"}',
        '{"task": "a"}\n{"task": ' + "[" * 100_000,
    ):
        file.write_text(text, errors="surrogateescape")
        with pytest.raises(DataError, match=r"tasks:2 is not \{\"task\": TEXT\}"):
            tool.read_tasks(None, str(file), interactive=False)
    file.write_text("")
    with pytest.raises(DataError, match="holds no lines"):
        tool.read_tasks(None, str(file), interactive=False)


def test_functions_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from math import sqrt\nfrom json import dumps\nlimit = 3\nclass A: pass\n"
        "def double(x: int) -> int:\n  return 2 * x\ndef _own(): pass\n"
    )
    tools = Tools(*tool.functions_of(str(file)))
    assert list(tools) == ["double"]
    # One with two names; a class that is a parameter.
    file.write_text(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n"
        "class P:\n  x: int\ndef first(p: P): return p.x\nsecond = first\n"
    )
    tools = Tools(*tool.functions_of(str(file)))
    assert tools.call([b'first {"p": {"x": 4}}']) == [b"4"]
    file.write_text("def double(x: int) -> int:\n  return 2 * x\n")
    tools = Tools(*tool.functions_of(str(file)))
    assert tools.call([b'double {"x": 4}']) == [b"8"]
    for text, message in [
        ("1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("x = (", "fails: SyntaxError"),
        ("x = 3", "defines no functions"),
        ("import sys; sys.exit()", "fails: SystemExit"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            list(tool.functions_of(str(file)))
    with pytest.raises(ConfigError, match="it must be a file of Python"):
        list(tool.functions_of(str(tmp_path / "mine.txt")))
