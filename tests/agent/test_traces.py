"""Files of traces, and logs of other tools: what comes back, and which line is at fault."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_pod.agent import traces
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.agent.traces import Trace
from spectral_pod.errors import DataError
from tests import trainer


@given(st.binary(max_size=20), st.sampled_from(["", "answered", "time"]), st.booleans())
def test_a_line_gives_the_same_trace(data, end, ended):
    trace = Trace((Turn(Role.USER, data), Turn(Role.ANSWER, data[::-1], ended)), end, end and "x")
    line = traces.to_line(trace)
    assert line.count("\n") == 1
    assert traces.from_line(line.encode()) == trace
    assert trace.answer == (data[::-1] if ended else None)


USER = {"role": "user", "text": "a"}
BAD = [
    ("{", "Expecting property name"),
    ("[]", "it is not a JSON object"),
    ({"format": "spectral_pod.trace/2", "turns": [USER]}, "format: Input should be"),
    ({"format": traces.FORMAT, "turns": []}, "turns: List should have at least 1 item"),
    ({"format": traces.FORMAT, "turns": [USER | {"x": 1}]}, "turns.0.x: Extra inputs"),
    ({"format": traces.FORMAT, "turns": [{"role": "system", "text": ""}]}, "turns.0.role"),
    ({"format": traces.FORMAT, "turns": [{"role": "user"}]}, "turn 1 must have either text or"),
    ({"format": traces.FORMAT, "turns": [USER, {"role": "answer", "base64": "*"}]}, "turn 2: its"),
    ({"format": traces.FORMAT, "turns": [USER, {"role": "result", "text": "x"}]}, "turn 2 is 'res"),
    ({"format": traces.FORMAT, "turns": [USER | {"ended": True}]}, "turns.0.ended"),
    ({"format": traces.FORMAT, "turns": [USER], "end": "tired"}, "end: Input should be"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "traces.jsonl"
    good = traces.to_line(Trace((Turn(Role.USER, b"a"),)))
    file.write_text(good + "\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    found = traces.read(str(file))
    assert next(found) == Trace((Turn(Role.USER, b"a"),))
    with pytest.raises(DataError, match=rf"traces.jsonl:3 is no trace: {message}.*correct this"):
        next(found)


def test_no_traces(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for name, message in [
        ("gone", "No such file"),
        ("", "folder|directory"),
        ("empty", "holds no"),
    ]:
        with pytest.raises(DataError, match=message):
            list(traces.read(str(tmp_path / name)))


# ---- logs


def called(identifier, name="add", arguments='{"a": 1}'):
    return {"id": identifier, "function": {"name": name, "arguments": arguments}}


def result(identifier, content="3"):
    return {"role": "tool", "tool_call_id": identifier, "content": content}


ASK = {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2?"}]}
SAY = {"role": "assistant", "content": "3"}
LOG = [
    {"role": "system", "content": "Be brief."},
    ASK,
    {"role": "assistant", "content": "I add.", "tool_calls": [called("x"), called("y", "é")]},
    result("y", "no such tool"),
    result("x"),
    SAY | {"reasoning_content": "Done."},
]


def converted(tmp_path, *conversations, name="log.jsonl"):
    file = tmp_path / name
    lines = [json.dumps({"messages": messages}) for messages in conversations]
    file.write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]")
    return list(traces.convert(str(file)))


@pytest.mark.parametrize("name", ["log.jsonl", "log.json"])
def test_a_log_becomes_turns(tmp_path, name):
    first, second = converted(tmp_path, LOG, [ASK, SAY], name=name)
    assert first.trace == Trace(
        (
            Turn(Role.USER, b"1+2?"),
            Turn(Role.THOUGHT, b"I add."),
            Turn(Role.CALL, b'add {"a": 1}'),
            Turn(Role.RESULT, b"3"),
            Turn(Role.CALL, 'é {"a": 1}'.encode()),
            Turn(Role.RESULT, b"no such tool"),
            Turn(Role.THOUGHT, b"Done."),
            Turn(Role.ANSWER, b"3"),
        )
    )
    assert first.fault == "1 messages of the system left out"
    assert (second.trace.answer, second.fault) == (b"3", "")


CALLS = {"role": "assistant", "tool_calls": [called("x")]}
FAULTS = [
    ("messages", "no list `messages`"),
    ([3], "no list `messages`"),
    ([], "does not end with an answer"),
    ([ASK], "does not end with an answer"),
    ([SAY], "turn 1 is 'answer'"),
    ([ASK, ASK, SAY], "turn 2 is 'user'"),
    ([ASK, CALLS, SAY], "the call 'x' of message 2 has no result of its own"),
    ([ASK, result("z"), SAY], "the result of 'z' belongs to no earlier call"),
    ([ASK, CALLS, result("x"), result("x"), SAY], "message 4 has no tool_call_id of its own"),
    ([ASK, CALLS, result(None), SAY], "message 3 has no tool_call_id"),
    ([ASK | {"content": [{"type": "image_url", "image_url": {}}]}, SAY], "a part of type 'image_u"),
    ([ASK | {"content": None}, SAY], "message 1 has no text"),
    ([ASK, SAY | {"refusal": "No."}], "message 2 has 'refusal'"),
    ([ASK, SAY | {"function_call": {"name": "f"}}], "message 2 has 'function_call'"),
    ([ASK, SAY | {"tool_calls": 3}], "a tool call without an `id`"),
    ([ASK, SAY | {"tool_calls": [called("x", "two words")]}, result("x"), SAY], "'two words'"),
    ([ASK, SAY | {"tool_calls": [called("x", arguments="{")]}, result("x"), SAY], "are no JSON"),
    ([ASK, SAY | {"tool_calls": [called("x", arguments="3")]}, result("x"), SAY], "no JSON object"),
    ([ASK, SAY, {"role": "critic", "content": "x"}], "the role 'critic'"),
    ([ASK | {"content": "\ud800"}, SAY], "no Unicode text"),
]


@pytest.mark.parametrize(("messages", "message"), FAULTS)
def test_what_cannot_be_converted_is_said(tmp_path, messages, message):
    good, bad = converted(tmp_path, [ASK, SAY], messages)
    assert good.trace is not None
    assert bad.trace is None
    assert message in bad.fault
    assert bad.place == f"{tmp_path}/log.jsonl:2"


def test_the_tool(tmp_path):
    converted(tmp_path, LOG, [ASK], [ASK, SAY])
    command = [sys.executable, "-m", "tools.traces", f"{tmp_path}/log.jsonl"]
    done = trainer.run([*command, f"--out={tmp_path}/out.jsonl"])
    assert f"{tmp_path}/log.jsonl:2: left out: it does not end with an answer" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("2 conversations written")
    assert len(list(traces.read(f"{tmp_path}/out.jsonl"))) == 2
