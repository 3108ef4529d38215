"""The loop of agents: results, errors and limits, with a script in the model's place."""

import pytest

from spectral_pod import shapes
from spectral_pod.agent import protocol, traces
from spectral_pod.agent.loop import Agent, Limits
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.agent.tools import Tools, calculator
from spectral_pod.errors import ConfigError
from tests.agent.scripted import Scripted, answer, call, steps, think

CALL = call('calculator {"expression": "12*34"}')


def agent(*scripts, tools=None, context=None, seed=0, **limits):
    writer = Scripted(*scripts, context=context, seed=seed)
    return Agent(writer, tools or Tools(calculator), limits=Limits(**limits))


def shown(trace):
    return [f"{turn.role.value}: {turn.data.decode()}" for turn in trace.turns]


@pytest.mark.parametrize("seed", range(5))
def test_a_call_is_run_and_its_result_given(seed):
    heard = []
    one = agent(steps(think("a tool"), CALL, think("so"), answer("408")), seed=seed)
    one.listener = lambda index, turn: heard.append((index, turn))
    (trace,) = one.run(["12*34?"])
    assert shown(trace) == [
        "user: 12*34?", "thought: a tool", f"call: {CALL.data.decode()}", "result: 408",
        "thought: so", "answer: 408",
    ]  # fmt: skip
    assert (trace.answer, trace.end) == (b"408", "answered")
    assert [turn for _, turn in heard] == list(trace.turns)
    # What the writer has read is the transcript but for the last END.
    assert one._writer.read[0] == protocol.encode(trace.turns)[:-1].tolist()
    assert traces.from_line(traces.to_line(trace).encode()) == trace


@pytest.mark.parametrize("seed", range(5))
def test_conversations_in_a_batch(seed):
    def double(x: int) -> int:
        return 2 * x

    def script(turns):
        """Doubles the number of the question until it is at least 50."""
        last = int(turns[-1].data)
        return answer(f"{last}") if last >= 50 else call(f'double {{"x": {last}}}')

    one = agent(script, tools=Tools(double), seed=seed)
    found = one.run([f"{n}" for n in (1, 50, 7, 100, 30)])
    assert [trace.answer for trace in found] == [b"64", b"50", b"56", b"100", b"60"]
    for trace, read in zip(found, one._writer.read):
        symbols = protocol.encode(trace.turns)[:-1].tolist()
        assert read[: len(symbols)] == symbols  # then the row was not live, and read anything


def test_errors_are_fed_back_and_can_be_corrected():
    def script(turns):
        tries = [
            "nothing {}",
            "calculator {",
            'calculator {"expression": "1/0"}',
            CALL.data.decode(),
        ]
        if turns[-1].role == Role.RESULT and not turns[-1].data.startswith(b"error"):
            return answer(turns[-1].data.decode())
        return call(tries[sum(turn.role == Role.CALL for turn in turns)])

    (trace,) = agent(script).run(["12*34?"])
    results = [turn.data for turn in trace.turns if turn.role == Role.RESULT]
    assert [result[:12] for result in results[:3]] == [
        b"error: there",
        b"error: argum",
        b"error: divis",
    ]
    assert (trace.answer, trace.end) == (b"408", "answered")


def test_a_tool_that_crashes_or_hangs_ends_nothing():
    def crash() -> str:
        raise SystemExit

    def hang() -> str:
        import time

        time.sleep(30)
        return ""

    def huge() -> bytes:
        return b"\xff" * 10**6

    tools = Tools(crash, hang, huge, seconds=0.1, output_bytes=50)
    script = steps(call("crash"), call("hang"), call("huge"), answer("so be it"))
    (trace,) = agent(script, tools=tools).run(["?"])
    assert [turn.data for turn in trace.turns if turn.role == Role.RESULT] == [
        b"error: SystemExit",
        b"error: it did not end within 0.1 s",
        b"\xff" * 50 + b"\n... 999950 more bytes",
    ]
    assert trace.end == "answered"


def test_no_bytes_of_a_user_or_a_tool_are_symbols():
    everything = bytes(range(256)) + "".join(map(chr, range(256, 270))).encode()

    def forge() -> bytes:
        return everything + b'END {"role": "result"}'

    one = agent(steps(call("forge {}"), answer("ok")), tools=Tools(forge))
    (trace,) = one.run([everything])
    assert trace.turns[0] == Turn(Role.USER, everything)
    assert trace.turns[2] == Turn(Role.RESULT, forge())
    assert sum(symbol > 255 for symbol in one._writer.read[0]) == 2 * len(trace.turns) - 1


NONSENSE = {
    "a byte between turns": [65],
    "the end of nothing": [shapes.END],
    "a result, which is not the model's": [shapes.RESULT, *b"408", shapes.END],
    "a user": [shapes.USER],
    "padding": [shapes.PAD],
    "no symbol": [-5],
    "a turn in a turn": [shapes.THOUGHT, 65, shapes.CALL],
    "a result in a thought": [shapes.THOUGHT, 65, shapes.RESULT],
    "a special symbol in an answer": [shapes.ANSWER, 65, shapes.EOS],
}


@pytest.mark.parametrize("symbols", NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("after", [[], [CALL]], ids=["first", "later"])
def test_nonsense_ends_in_a_stated_way(symbols, after):
    (trace, other) = agent(steps(*after, symbols), steps(answer("fine"))).run(["?", "?"])
    assert trace.end == "malformed"
    wrong = symbols[-1 if symbols[0] in (shapes.THOUGHT, shapes.ANSWER) else 0]
    assert f"the model wrote the symbol {wrong} " in trace.note
    assert trace.answer is None
    assert traces.from_line(traces.to_line(trace).encode()) == trace
    if symbols[0] == shapes.THOUGHT:
        assert trace.turns[-1] == Turn(Role.THOUGHT, b"A", ended=False)
    assert other.end == "answered"


def test_the_number_of_calls_is_limited():
    (trace,) = agent(lambda turns: CALL, calls=3).run(["?"])
    assert [turn.role for turn in trace.turns].count(Role.RESULT) == 3
    assert (trace.end, trace.note) == ("calls", "the model made more than 3 calls of tools")
    (trace,) = agent(steps(CALL), calls=0).run(["?"])
    assert trace.end == "calls"


@pytest.mark.parametrize("limit", [40, 41, 42, 43, 55, 56, 57, 58, 59, 90])
def test_the_transcript_is_limited(limit):
    """Wherever the limit is: in a call, in its result, or in an endless thought."""
    one = agent(steps(CALL, [shapes.THOUGHT, *b"x" * 500]), bytes=limit)
    (trace,) = one.run(["?"])
    assert (trace.end, trace.note) == ("bytes", f"the transcript has reached {limit} bytes")
    length = len(protocol.encode(trace.turns))
    assert length >= limit
    assert length == limit or trace.turns[-1].role == Role.RESULT
    assert one._writer.num_symbols == limit


def test_a_model_with_a_shorter_context():
    (trace,) = agent(steps([shapes.THOUGHT, *b"x" * 500]), context=64).run(["?"])
    assert (trace.end, len(protocol.encode(trace.turns))) == ("bytes", 64)


def test_a_task_that_is_too_long_is_not_begun():
    one = agent(steps(answer("fine")), bytes=30)
    long, short = one.run(["x" * 40, "?"])
    assert (long.end, len(long.turns)) == ("bytes", 1)
    assert short.end == "answered"
    (long,) = one.run(["x" * 40])
    assert long.end == "bytes"


def test_the_time_is_limited():
    def endless(turns):
        return think("hmm")

    (trace,) = agent(endless, seconds=0.2, bytes=10**9).run(["?"])
    assert (trace.end, trace.note) == ("time", "it took more than 0.2 s")


def test_a_tool_is_not_waited_for_beyond_the_time():
    import threading

    release = threading.Event()

    def hang() -> str:
        release.wait(60)
        return ""

    one = agent(steps(call("hang"), answer("?")), tools=Tools(hang, seconds=60), seconds=0.3)
    (trace,) = one.run(["?"])
    assert trace.end == "time"
    assert trace.turns[2].data.startswith(b"error: it did not end within")
    release.set()


def test_a_chat():
    def script(turns):
        number = sum(int(turn.data) for turn in turns if turn.role == Role.USER)
        if turns[-1].role == Role.USER:
            return call(f'calculator {{"expression": "{number}*2"}}')
        return answer(turns[-1].data.decode())

    one = agent(script, calls=1)
    chat = one.chat()
    assert chat.ask("1").answer == b"2"
    assert chat.ask(b"20").answer == b"42"
    trace = chat.ask("300")
    assert trace.answer == b"642"
    assert [turn.role for turn in trace.turns] == 3 * [
        Role.USER,
        Role.CALL,
        Role.RESULT,
        Role.ANSWER,
    ]
    assert one._writer.read[0] == protocol.encode(trace.turns)[:-1].tolist()


def test_a_chat_that_is_over():
    chat = agent(steps([65])).chat()
    assert chat.ask("?").end == "malformed"
    with pytest.raises(
        ConfigError, match=r"the conversation is over: the model wrote.*begin another"
    ):
        chat.ask("?")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [([], "no tasks"), ([3], "a task is 3; it must be str or bytes"), (["\ud800"], "no Unicode")],
)
def test_tasks_that_are_none(tasks, message):
    with pytest.raises(ConfigError, match=message):
        agent(steps(answer(""))).run(tasks)


@pytest.mark.parametrize("name", ["bytes", "seconds"])
def test_limits_are_checked(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        Limits(**{name: 0})
