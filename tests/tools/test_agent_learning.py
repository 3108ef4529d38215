"""Agents are asked held-out questions, and learn from their own conversations."""

import argparse
import collections
import json
import sys

import numpy as np
import pytest
from etils import epath

from spectral_pod import config as config_lib
from spectral_pod import project_files
from spectral_pod.agent import traces
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.agent.traces import Trace
from spectral_pod.data.drawn import Drawn
from spectral_pod.data.tasks.agent import FAILURES, AgentTask
from spectral_pod.data.tasks.agent_kinds import Question
from spectral_pod.errors import ConfigError, DataError
from tests import trainer
from tests.agent.scripted import Scripted, answer, call
from tests.tiny_run import tiny_config
from tools import agent_evaluate, agent_questions, agent_reject

SUM = Question(b"what is 41+2?", b"43", "addition", b'calculator {"expression": "41+2"}', 2)
CODE = Question(b"spell ab backwards", b"ba", "strings", b'python {"code": "x"}', 0)
WORD = Question(b"repeat abc", b"abc", "repeat", b"", 0)


def conversation(question, *turns, end="answered"):
    """Turns from strings such as "call: x"; what has no role is an answer."""
    found = [Turn(Role.USER, question.text)]
    for turn in turns:
        role, colon, text = turn.partition(": ")
        found.append(Turn(Role(role), text.encode()) if colon else answer(turn))
    return Trace(tuple(found), end)


VERDICTS = [
    (SUM, ("call: a", "result: 43", "43"), "kept"),
    (SUM, ("call: a", "result: error: x", "call: a", "result: 43", "43"), "kept"),
    (SUM, ("call: a", "result: 43", "call: a", "result: 43", "43"), "needless call"),
    (SUM, ("call: a", "result: 43", "call: a", "result: error: x", "43"), "guessed"),
    (SUM, ("call: a", "result: 44", "43"), "guessed"),
    (SUM, ("43",), "guessed"),
    (SUM, ("call: a", "result: 43", "34"), "wrong answer"),
    (CODE, ("call: a", "result: ba\n", "ba"), "kept"),
    (CODE, ("call: a", "result: ba\n", "ba\n"), "wrong answer"),
    (WORD, ("abc",), "kept"),
    (WORD, ("ab",), "wrong answer"),
    (WORD, ("call: a", "result: abc", "abc"), "needless call"),
]


@pytest.mark.parametrize(("question", "turns", "expected"), VERDICTS)
def test_what_is_kept(question, turns, expected):
    assert agent_reject.verdict(question, conversation(question, *turns)) == expected


def test_what_has_no_answer_is_not_kept():
    cut = conversation(SUM, "call: a", "result: 43", end="calls")
    assert agent_reject.verdict(SUM, cut) == "no answer"


def test_equal_conversations_are_kept_once():
    one, other = conversation(WORD, "abc"), conversation(WORD, "ab")
    kept, verdicts = agent_reject.keep([WORD, WORD], [one, other, one, one], samples=2)
    assert kept == [one]
    assert verdicts == {"kept": 3, "wrong answer": 1}


# ---- questions, with a script in the model's place


class Trained:
    """What is asked of a trained model."""

    def __init__(self, **options):
        self.config = tiny_config(**{"data.task": "agent", "data.seq_len": 320, "seed": 5})
        self.config.data.options = config_lib.ConfigDict(options)
        self.step = 1


def calculates(turns):
    """Calls the calculator until its result is no error, and answers it."""
    last = turns[-1]
    if last.role == Role.RESULT and not last.data.startswith(b"error: "):
        return answer(last.data.decode())
    text = turns[0].data.decode()
    if text.startswith("repeat "):
        return answer(text.removeprefix("repeat "))
    if text.startswith("tell me "):
        key, _, table = text.removeprefix("tell me ").partition(", given ")
        return answer(dict(row.split(" is ") for row in table.split(", "))[key])
    expression = text.translate(
        {ord(c): None for c in map(chr, range(128)) if c not in "0123456789+-*"}
    )
    return call(json.dumps({"expression": expression}).join(["calculator ", ""]))


def gives_up(turns):
    """Likewise, but answers an error."""
    last = turns[-1]
    return (
        answer("?")
        if last.role == Role.RESULT and last.data.startswith(b"err")
        else calculates(turns)
    )


@pytest.fixture
def model(monkeypatch):
    """Sets the script that answers."""

    def use(*scripts):
        def writer(trained, **options):
            return Scripted(*scripts, context=None)

        monkeypatch.setattr(agent_questions, "ModelWriter", writer)

    return use


def evaluate(failing=False, questions=150, **options):
    flags = argparse.Namespace(
        questions=questions, batch=40, digits=None, failing=failing, sandbox="rlimits"
    )
    asked = agent_evaluate.ask(Trained(**options), flags, seed=5)
    return asked, agent_evaluate.report(asked, failing=failing)


def test_the_questions_are_those_of_the_test_split(model):
    """As a run draws them for its evaluation, whatever the batch."""
    model(calculates)
    asked, _ = evaluate(questions=50)
    task, found = AgentTask(), []
    source = Drawn(
        lambda rng: found.append(task.conversation("test", rng)[0]), "test",
        max_length=1, batch_size=1, seq_len=1, seed=5, num_records=50,
    )  # fmt: skip
    for i in range(50):
        source.draw(i)
    assert [one.question.text for one in asked] == [turns[0].data for turns in found]
    assert [one.question.answer for one in asked] == [turns[-1].data for turns in found]


def test_a_report(model):
    model(calculates)
    asked, report = evaluate()
    needing = [one.question for one in asked if one.question.call]
    assert report["questions"] == 150
    assert report["arithmetic"] == {"questions": len(needing), "exact": 1.0}
    counts = collections.Counter(q.digits for q in needing)
    assert report["by_digits"] == {
        str(n): {"questions": c, "exact": 1.0} for n, c in sorted(counts.items())
    }
    assert sum(group["questions"] for group in report["by_kind"].values()) == 150
    assert "recovered" not in report
    # The script calls the calculator for one digit plus another as well.
    words = sum(one.question.kind in ("repeat", "table") for one in asked)
    plain = report["plain"]
    assert (plain["questions"], plain["exact"]) == (150 - len(needing), 1.0)
    assert plain["without_call"] == words / plain["questions"] < 1


def test_questions_for_python_are_reported(model):
    """Code runs in the sandbox: its answers are those that the task expects."""
    questions = agent_questions.questions_of(AgentTask(python=0.5), "test", 5, range(30))
    calls = {question.text: question.call for question in questions}

    def runs(turns):
        last = turns[-1].data.decode().removesuffix("\n")
        known = calls[turns[0].data].decode()
        return call(known) if known and len(turns) == 1 else answer(last)

    model(runs)
    asked, report = evaluate(questions=30, python=0.5)
    coded = [one for one in asked if one.question.tool == "python"]
    assert report["code"] == {"questions": len(coded), "exact": 1.0}
    assert len(coded) >= 5
    assert report["arithmetic"]["exact"] == 1.0


def test_every_first_call_fails(model):
    model(calculates, gives_up)
    asked, report = evaluate(failing=True, questions=160)
    for i, one in enumerate(asked):
        results = [turn.data.decode() for turn in one.trace.turns if turn.role == Role.RESULT]
        if results:
            assert results[0] == FAILURES[i % len(FAILURES)]
            assert results[1:] == ([one.question.answer.decode()] if i % 2 == 0 else [])
    called = [i for i, one in enumerate(asked) if one.has_call]
    share = np.mean([i % 2 == 0 for i in called])
    assert report["recovered"] == {"questions": len(called), "exact": pytest.approx(share)}
    assert 0.3 < share < 0.7


def test_a_run_without_a_tool_has_none(model):
    model(gives_up)
    asked, report = evaluate(tool=False)
    results = {turn.data for one in asked for turn in one.trace.turns if turn.role == Role.RESULT}
    assert results == {b"error: there is no tool 'calculator'; there are:"}
    assert report["arithmetic"]["exact"] == 0


def test_digits_and_runs_of_traces():
    trained = Trained(digits=3, plain=0.5)
    assert agent_questions.task_of(trained, None) == AgentTask(digits=3, plain=0.5)
    assert agent_questions.task_of(trained, 2) == AgentTask(digits=2, plain=0.5)
    trained.config.data.task, trained.config.data.options = "agent_traces", config_lib.ConfigDict()
    assert agent_questions.task_of(trained, 4) == AgentTask(digits=4)
    trained.config.data.task = "rag"
    with pytest.raises(ConfigError, match="the run was trained on 'rag'; these questions are for"):
        agent_questions.task_of(trained, None)


# ---- samples


def flags(**values):
    given = {"questions": 6, "samples": 2, "batch": 5, "seed": 1, "temperature": 1.0}
    given["sandbox"] = "rlimits"
    return argparse.Namespace(**given | values)


def sampled(folder, **values):
    trained, task = Trained(), AgentTask(failing=0.5)
    questions = agent_questions.questions_of(task, "train", 1, range(6))
    found = agent_reject.sample(trained, task, questions, flags(**values), epath.Path(folder))
    assert [trace.turns[0].data for trace in found] == [q.text for q in questions for _ in range(2)]
    return found


def test_sampling_goes_on_where_it_was_interrupted(model, tmp_path, monkeypatch):
    model(calculates)
    whole = sampled(tmp_path / "whole")
    assert len(list((tmp_path / "whole").iterdir())) == 3
    assert any(t.data.startswith(b"error") for x in whole for t in x.turns if t.role == Role.RESULT)
    converse, calls = agent_questions.converse, []

    def interrupted(*arguments, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return converse(*arguments, **options)

    monkeypatch.setattr(agent_questions, "converse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path / "parts")
    assert sampled(tmp_path / "parts") == whole
    assert len(calls) == 4  # the second batch twice
    assert calls[1] == calls[2]
    assert len(set(calls)) == 3  # no two batches draw alike
    assert sampled(tmp_path / "parts") == whole
    assert len(calls) == 4


def test_other_samples_are_refused(model, tmp_path):
    model(calculates)
    sampled(tmp_path)
    (tmp_path / "000000.jsonl").write_bytes((tmp_path / "000001.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"000000\.jsonl has other conversations than were sampled"):
        sampled(tmp_path)


def test_what_is_trained_on(tmp_path):
    kept = [conversation(WORD, "abc")] * 3
    out = epath.Path(tmp_path)
    task = AgentTask()
    assert agent_reject.write(task, kept, flags(generated=0.25), 7, out) == 1
    training = list(traces.read(f"{tmp_path}/training.jsonl"))
    assert [trace.turns for trace in training[:3]] == [kept[0].turns] * 3
    assert len(training) == 4
    assert len(list(traces.read(f"{tmp_path}/validation.jsonl"))) == 7
    assert agent_reject.write(task, kept, flags(generated=0.0), 7, out) == 0


# ---- the commands


def run(*arguments, code=0):
    command = [sys.executable, "-m", *map(str, arguments)]
    return trainer.run(command, code, timeout=600)


@pytest.mark.slow
def test_evaluation_rejection_and_further_training(tmp_path):
    """A tiny model that has learned to repeat letters learns from its own conversations."""
    agent = ("data.task=agent", "data.options.plain=1.0", "data.options.digits=1",
             "data.seq_len=240", "model.hidden_dim=32", "train.total_steps=300",
             "train.eval_every_steps=100", "checkpoint.every_steps=100", "train.eval_records=32",
             "train.eval_split=validation", "train.global_batch_size=16", "optimizer.average=0.9",
             "train.sample_bytes=0", "model.name=spectral_gpt", "data.truncate=False",
             "optimizer.learning_rate=1e-2", "optimizer.dynamics_learning_rate=1e-2",
             "model.dropout=0.0", "model.positions=none", "train.grad_accumulation=1",
             "train.log_every_steps=50")  # fmt: skip
    config = tmp_path / "config.py"
    config.write_text(
        "from tests import trainer\nfrom ml_collections import ConfigDict\n"
        "def get_config():\n    c = trainer.get_config()\n    c.data.options = ConfigDict()\n"
        "    c.model.memory_interval = 1\n    return c\n"
    )
    trainer.run(trainer.command(tmp_path / "run", *agent, config=config), timeout=600)
    evaluated = run(
        "tools.agent_evaluate", f"--workdir={tmp_path}/run", "--questions=40", "--batch=40",
        f"--out={tmp_path}/asked.jsonl",
    )  # fmt: skip
    before = json.loads(evaluated.stdout)
    assert before["plain"]["questions"] == 40
    assert len(list(traces.read(f"{tmp_path}/asked.jsonl"))) == 40
    command = ("tools.agent_reject", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out",
               "--questions=40", "--samples=2", "--batch=40", "--steps=40")  # fmt: skip
    report = json.loads(run(*command).stdout)
    assert report["sampled"] == sum(report["verdicts"].values()) == 80
    assert report["verdicts"]["kept"] >= report["distinct"] == report["generated"] > 0
    lines = project_files.Log(epath.Path(tmp_path) / "out/run/starts.jsonl", project_files.START)
    assert lines.lines[0]["start_from"]["step"] == report["from_step"] == 300
    # The same command has nothing left to do, and another one is refused.
    assert json.loads(run(*command).stdout)["eval"] == report["eval"]
    refused = run(*command, "--temperature=0.5", code=2).stderr
    assert "temperature 1.0 there, 0.5 now" in refused
    assert "Traceback" not in refused
    after = json.loads(
        run(
            "tools.agent_evaluate", f"--workdir={tmp_path}/out/run", "--questions=40",
            "--batch=40", "--digits=1",
        ).stdout
    )  # fmt: skip
    assert after["step"] == 40
    assert after["questions"] == 40


def test_a_run_that_went_on_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(agent_reject.SealedSteps, "latest_sound_step", 3)
    with pytest.raises(ConfigError, match="checkpoint of step 3 now, and step 2 was sampled"):
        agent_reject._check_step(str(tmp_path), 2)
