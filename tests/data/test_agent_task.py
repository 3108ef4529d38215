"""Conversations for agents: right answers, calls that are real, and what is held out."""

import itertools
import re

import numpy as np
import pytest

from spectral_pod.agent import protocol
from spectral_pod.agent.protocol import Role
from spectral_pod.agent.sandbox import Sandbox
from spectral_pod.agent.tools import Tools, calculator
from spectral_pod.data.tasks.agent import AgentTask
from spectral_pod.data.tasks.agent_kinds import (
    CODE,
    HELD_OUT,
    HELD_OUT_LETTERS,
    HELD_OUT_QUESTIONS,
    is_held_out,
)
from spectral_pod.data.tasks.conversation_task import LONGEST_OPENING
from spectral_pod.errors import ConfigError

SPLITS = ("train", "validation", "test")


def conversations(task, split, count=300):
    return [task.conversation(split, np.random.default_rng(i))[0] for i in range(count)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("tool", [True, False])
def test_answers_are_right(split, tool):
    for turns in conversations(AgentTask(tool=tool), split):
        protocol.check(turns)
        question, answer = turns[0].data.decode(), turns[-1].data.decode()
        if split == "train":  # what may be said before it
            question = re.sub(
                r"^([a-z]{1,5} )*(?=(repeat|what|calculate|how|of|tell) )", "", question
            )
        assert turns[-1].role == Role.ANSWER
        asked = re.search(r"(\d+) ?([-+*]) ?(\d+)", question)
        if asked:
            expected = str(eval(asked[0]))
        elif question.startswith("repeat "):
            expected = question.removeprefix("repeat ")
        else:
            rows = dict(re.findall(r"([a-z]+) is (\d+)", question))
            if split == "test":
                key = question.removeprefix("tell me ").partition(",")[0]
            else:
                key = re.search(r"([a-z]+)( is|\?)$", question)[1]
            expected = rows[key]
        assert answer == expected
        calls = [turn for turn in turns if turn.role == Role.CALL]
        assert bool(calls) <= tool
        assert not calls or turns[-2].data.decode() == answer


def test_results_are_those_of_the_tool():
    """But for failures, which `calculator` does not have."""
    tools, failures = Tools(calculator), 0
    for turns in conversations(AgentTask(), "train"):
        for call, result in itertools.pairwise(turns):
            if call.role == Role.CALL and tools.call([call.data]) != [result.data]:
                assert result.data.startswith(b"error: ")
                failures += 1
    assert 20 < failures < 60  # of 300 x 0.8 x 0.15 = 36


def test_code_prints_what_is_answered():
    """In the sandbox; also what is printed where the code is wrong."""
    task, tools = AgentTask(python=1.0, plain=0.0, failing=0.0, mistaken=0.4), Tools(seconds=60)
    tools.add(Sandbox("rlimits").python)
    questions, pairs = set(), {}
    for turns in conversations(task, "train", 60) + conversations(task, "test", 60):
        protocol.check(turns)
        assert turns[-2].data == turns[-1].data + b"\n"
        questions.add(re.sub(rb"'[a-z]+'|[\d, -]", b"", turns[-3].data))
        pairs |= {
            call.data: result.data
            for call, result in itertools.pairwise(turns)
            if call.role == Role.CALL
        }
    assert len(questions) == len(CODE)
    assert sum(result.startswith(b"error: line 1: SyntaxError") for result in pairs.values()) > 10
    assert tools.call(list(pairs)) == list(pairs.values())


def test_what_is_held_out_of_questions_for_python():
    task, first = AgentTask(python=1.0, plain=0.0), {}
    for split in SPLITS:
        found = [task.question(split, np.random.default_rng(i)) for i in range(400)]
        code = [re.search(rb"'([a-z]+)'|\[(\d+)|'..(\d\d)-", one.call) for one in found]
        held_out = [
            chr(m[1][0]) in HELD_OUT_LETTERS if m[1] else int(m[2] or m[3]) in HELD_OUT
            for m in code
            if m
        ]
        assert set(held_out) == {split != "train"}
        first[split] = {one.text.split()[0] for one in found}
    assert b"spell" in first["train"] - first["test"]


def test_kinds_of_conversations():
    found = conversations(AgentTask(), "train", 1000)
    calls = [sum(turn.role == Role.CALL for turn in turns) for turns in found]
    assert np.mean([n == 0 for n in calls]) == pytest.approx(0.2, abs=0.05)
    assert np.mean([n > 1 for n in calls]) == pytest.approx(0.8 * 0.235, abs=0.05)
    assert max(calls) == 3


def test_what_is_held_out():
    task = AgentTask()

    def first_numbers(split):
        found = [turns[0].data.decode() for turns in conversations(task, split)]
        return [int(m[1]) for text in found if (m := re.search(r"(\d\d+) ?[-+*]", text))]

    assert not any(map(is_held_out, first_numbers("train")))
    for split in ("validation", "test"):
        assert all(map(is_held_out, first_numbers(split)))
        assert len(first_numbers(split)) > 150
    for split in SPLITS:
        text = " ".join(turns[0].data.decode() for turns in conversations(task, split))
        for question in HELD_OUT_QUESTIONS:
            assert (question[:12] in text) == (split == "test")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    "options", [{}, {"tool": False}, {"digits": 1}, {"digits": 40}, {"python": 0.5}]
)
def test_the_longest_example(options, split):
    task = AgentTask(**options)
    draw = task.drawer(split)
    lengths = [len(draw(np.random.default_rng(i))[0]) for i in range(300)]
    assert max(lengths) <= task.max_length
    likely = AgentTask(
        **options
        | {"failing": 1.0, "mistaken": 1.0, "plain": 0.0 if options.get("tool", True) else 1.0}
    )
    lengths = [len(likely.drawer(split)(np.random.default_rng(i))[0]) for i in range(1000)]
    opening = 0 if split == "train" else LONGEST_OPENING
    assert max(lengths) > 0.85 * (task.max_length - opening)


def test_mistakes_are_not_scored_and_their_corrections_are():
    task = AgentTask(mistaken=1.0, failing=0.0, plain=0.0)
    for i in range(30):
        turns, mistake = task.conversation("train", np.random.default_rng(i))
        assert mistake == 1
        assert [turn.role for turn in turns] == [
            Role.USER, Role.CALL, Role.RESULT, Role.CALL, Role.RESULT, Role.ANSWER,
        ]  # fmt: skip
        assert turns[2].data.startswith(b"error: ")
        _, labels = task.draw(np.random.default_rng(i))
        scored = protocol.SYMBOL_OF_CLASS[labels[labels >= 0]].tolist()
        assert scored == protocol.symbols_of(turns[3]) + protocol.symbols_of(turns[5])


def test_sizes():
    assert AgentTask().num_classes == protocol.NUM_CLASSES
    assert AgentTask().vocab_size == protocol.VOCAB_SIZE
    with pytest.raises(ConfigError, match=r"options.digits is 101"):
        AgentTask(digits=101)
