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


def scripted(*scripts, **limits):
    def listener(index, turn):
        tool._print(index, turn)

    return Agent(Scripted(*scripts), Tools(calculator), limits=Limits(**limits), listener=listener)


def arguments(**values):
    return types.SimpleNamespace(**{"interactive": False, "batch": None} | values)


def test_a_task_prints_its_turns(capfdbinary):
    script = steps(call('calculator {"expression": "6*7"}'), answer("\x1b[31m42\n\t\x9b"))
    out = io.StringIO()
    tool.converse(scripted(script), [b"6*7?"], arguments(), out)
    assert capfdbinary.readouterr().out.decode().splitlines() == [
        "user: 6*7?",
        'call: calculator {"expression": "6*7"}',
        "result: 42",
        r"answer: \x1b[31m42",
        "\t\\x9b",
    ]
    trace = traces.from_line(out.getvalue().encode())
    assert trace.answer == b"\x1b[31m42\n\t\xc2\x9b"


def test_a_task_without_an_answer_is_an_error(capfdbinary):
    out = io.StringIO()
    with pytest.raises(UserError, match="there is no answer: the model wrote the symbol 65"):
        tool.converse(scripted(steps([65])), [b"?"], arguments(), out)
    assert traces.from_line(out.getvalue().encode()).end == "malformed"


def test_a_chat(capfdbinary):
    def script(turns):
        return answer(f"{sum(turn.role == Role.USER for turn in turns)}")

    out = io.StringIO()
    tool.chat(scripted(script), io.BytesIO(b"a\r\n\nlast"), out)
    trace = traces.from_line(out.getvalue().encode())
    assert [turn.data for turn in trace.turns] == [b"a", b"1", b"", b"2", b"last", b"3"]
    assert capfdbinary.readouterr().err.decode() == "> > > > "
    tool.chat(scripted(steps([65])), io.BytesIO(b"a\nb\n"), None)
    assert "the conversation is over: the model wrote" in capfdbinary.readouterr().err.decode()


def test_a_chat_that_is_interrupted_is_kept():
    class Lines:
        def __init__(self):
            self.lines = [b"a\n"]

        def readline(self):
            if not self.lines:
                raise KeyboardInterrupt
            return self.lines.pop()

    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        tool.chat(scripted(steps(answer("1"))), Lines(), out)
    assert traces.from_line(out.getvalue().encode()).answer == b"1"


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
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=r"tasks:2 is not \{\"task\": TEXT\}"):
            tool.read_tasks(None, str(file), interactive=False)
    file.write_text("")
    with pytest.raises(DataError, match="holds no tasks"):
        tool.read_tasks(None, str(file), interactive=False)


def test_functions_of_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from math import sqrt\nfrom json import dumps\nlimit = 3\nclass A: pass\n"
        "def double(x: int) -> int:\n  return 2 * x\ndef _own(): pass\n"
    )
    tools = Tools(*tool.functions_of(str(file)))
    assert list(tools) == ["double"]
    assert tools.call([b'double {"x": 4}']) == [b"8"]
    for text, message in [
        ("1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("x = (", "fails: SyntaxError"),
        ("x = 3", "defines no functions"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            list(tool.functions_of(str(file)))
    with pytest.raises(ConfigError, match="it must be a file of Python"):
        list(tool.functions_of(str(tmp_path / "mine.txt")))
