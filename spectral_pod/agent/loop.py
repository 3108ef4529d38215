"""Agents: conversations in which a model's calls are run, and their results given to it.

    agent = Agent.from_checkpoint(WORKDIR, Tools(calculator, Sandbox().python))
    for trace in agent.run(["what is 12*34?", "and 56*78?"]):
        print(trace.answer, trace.end)

    chat = agent.chat()                  # one conversation over several questions
    chat.ask("what is 12*34?").answer

The model writes until it has ended a turn. A call is run, its result becomes the next turn, and the
model goes on from the state that it is in: nothing is read twice. Errors and time-outs of tools are
results like others, from which it can correct itself. Conversations in one batch advance together,
and all wait while a tool runs; calls made at the same position run at the same time.

A conversation ends in one of these ways, which its trace names: the model has "answered"; it has
made as many "calls" as it may; the transcript is full ("bytes"); the "time" is over; or what it
wrote is no turn ("malformed"), such as a result, which is not its to write.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Self

from jax.sharding import Mesh

from spectral_pod import fields
from spectral_pod.agent import protocol
from spectral_pod.agent.protocol import FOLLOWS, WRITTEN, Role, Turn
from spectral_pod.agent.tools import Tools
from spectral_pod.agent.traces import Trace
from spectral_pod.agent.writer import GREEDY, ModelWriter, Stream, Writer
from spectral_pod.errors import ConfigError
from spectral_pod.fields import NonNegative, Positive, PositiveTime
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.sampling import Sampling
from spectral_pod.shapes import END

_ROLE = {protocol.SYMBOL[role]: role for role in WRITTEN}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on a conversation.

    Attributes:
      calls: of tools, for a question.
      bytes: of the transcript, the symbols of turns included. The model may have a lower one.
      seconds: for a question; a tool that is running then is not waited for.

    Raises:
      ConfigError: a value is out of its range.
    """

    calls: NonNegative = 16
    bytes: Positive = 8192
    seconds: PositiveTime = 300.0

    def __post_init__(self) -> None:
        fields.check_all(self)


Listener = Callable[[int, Turn], None]  # hears of each turn, with the index of its conversation


class Agent:
    """A writer of turns with tools and limits."""

    def __init__(
        self,
        writer: Writer,
        tools: Tools,
        *,
        limits: Limits | None = None,
        listener: Listener = lambda index, turn: None,
    ):
        """See the class.

        Args:
          listener: is called with every turn that has ended.
        """
        self.tools, self.listener = tools, listener
        self._writer, self.limits = writer, limits or Limits()
        if writer.context is not None and writer.context < self.limits.bytes:
            self.limits = dataclasses.replace(self.limits, bytes=writer.context)

    @classmethod
    def from_checkpoint(
        cls,
        workdir: str,
        tools: Tools,
        *,
        step: int | None = None,
        mesh: Mesh | None = None,
        dtype: str = "float32",
        sampling: Sampling = GREEDY,
        seed: int = 0,
        limits: Limits | None = None,
        listener: Listener = lambda index, turn: None,
    ) -> Self:
        """An agent with the model of a run; see `generate.restore.restore_for_inference`.

        Raises:
          UserError: there is no sound checkpoint, or the model does not write conversations.
        """
        trained = restore_for_inference(workdir, step=step, mesh=mesh, dtype=dtype)
        writer = ModelWriter(trained, sampling=sampling, seed=seed)
        return cls(writer, tools, limits=limits, listener=listener)

    def run(self, tasks: Sequence[str | bytes]) -> list[Trace]:
        """A conversation about each of the tasks, in one batch.

        Raises:
          ConfigError: there are no tasks, or one is no text.
        """
        if not tasks:
            raise ConfigError("there are no tasks; give at least one")
        talks = [_Conversation(self, index) for index in range(len(tasks))]
        for talk, task in zip(talks, tasks):
            talk.ask(_data(task))
        _converse(self, talks, None)
        return [talk.trace() for talk in talks]

    def chat(self) -> "Chat":
        """A conversation over several questions."""
        return Chat(self)

    def results(self, calls: Sequence[tuple[int, bytes]], seconds: float) -> list[bytes]:
        """The results of calls that are made at the same position, each by the conversation with
        the given index; `seconds` are left.
        """
        return self.tools.call([call for _, call in calls], seconds=seconds)

    def begin(self, talks: Sequence["_Conversation"]) -> Stream:
        """The stream of new conversations, whose last symbol so far is still to be read."""
        symbols = [talk.given[:-1] for talk in talks]
        for talk in talks:
            talk.given = talk.given[-1:]
        return self._writer.begin(symbols, self.limits.bytes)


class Chat:
    """One conversation over several questions. Its limit of bytes is of all of them together."""

    def __init__(self, agent: Agent):
        self._agent, self._talk = agent, _Conversation(agent, 0)
        self._stream: Stream | None = None

    def ask(self, question: str | bytes) -> Trace:
        """The conversation so far, with what came of this question.

        Raises:
          ConfigError: the conversation has ended in another way than with an answer.
        """
        if self._talk.end not in ("", "answered"):
            raise ConfigError(f"the conversation is over: {self._talk.note}; begin another one")
        self._talk.ask(_data(question))
        self._stream = _converse(self._agent, [self._talk], self._stream)
        return self._talk.trace()


def _data(task: str | bytes) -> bytes:
    if not isinstance(task, (str, bytes)):
        raise ConfigError(f"a task is {fields.shown(task)}; it must be str or bytes")
    try:
        return task.encode() if isinstance(task, str) else task
    except UnicodeEncodeError as error:
        raise ConfigError(f"a task is {fields.shown(task)}, which is no Unicode text") from error


class _Conversation:
    """One conversation.

    Attributes:
      index: among those of its batch.
      turns: those that have ended.
      given: symbols that the model has still to read, before it writes again.
      call: one that is to be run.
      end, note: see `Trace`; "" while it goes on.
    """

    def __init__(self, agent: Agent, index: int):
        self.turns: list[Turn] = []
        self.given: list[int] = []
        self.call: bytes | None = None
        self.end, self.note = "", ""
        self._agent, self.index = agent, index
        self._role: Role | None = None  # of the turn that the model is writing
        self._data = bytearray()
        self._length = 0  # symbols of the transcript
        self._num_calls = 0

    @property
    def is_live(self) -> bool:
        return not self.end

    def trace(self) -> Trace:
        cut = [Turn(self._role, bytes(self._data), ended=False)] if self._role else []
        return Trace((*self.turns, *cut), self.end, self.note)

    def ask(self, question: bytes) -> None:
        """A user's turn."""
        self.end, self.note, self._num_calls = "", "", 0
        self._say(Turn(Role.USER, question))

    def hear(self, read: int, written: Sequence[int]) -> None:
        """What became of it: how many of the given symbols were read, and what the model wrote."""
        self.given = self.given[read:]
        for symbol in written:
            if self.end:
                return
            self._write(symbol)

    def answer_call(self, result: bytes) -> None:
        """The result of its call."""
        self.call = None
        self._say(Turn(Role.RESULT, result))

    def finish(self, end: str, note: str) -> None:
        """Ends it, unless it has ended."""
        if not self.end:
            self.end, self.note = end, note

    def _say(self, turn: Turn) -> None:
        """Adds a turn of another than the model; what it wrote last, an END, is not yet read."""
        symbols = protocol.symbols_of(turn)
        self.given += [END, *symbols] if self.turns else symbols
        self._add(turn, len(symbols))
        self._check_length()

    def _add(self, turn: Turn, length: int) -> None:
        self.turns.append(turn)
        self._length += length
        self._agent.listener(self.index, turn)

    def _write(self, symbol: int) -> None:
        """A symbol that the model wrote."""
        if self._role is None and _ROLE.get(symbol) in FOLLOWS[self.turns[-1].role]:
            self._role = _ROLE[symbol]
        elif self._role is not None and 0 <= symbol < 256:
            self._data.append(symbol)
        elif self._role is not None and symbol == END:
            turn, self._role, self._data = Turn(self._role, bytes(self._data)), None, bytearray()
            self._add(turn, 0)
            self._end_turn(turn)
        else:
            where = f"in a turn {self._role.value!r}" if self._role else "between turns"
            self.finish("malformed", f"the model wrote the symbol {symbol} {where}")
            return
        self._length += 1
        self._check_length()

    def _end_turn(self, turn: Turn) -> None:
        limit = self._agent.limits.calls
        if turn.role == Role.ANSWER:
            self.finish("answered", "the model has answered")
        elif turn.role == Role.CALL and self._num_calls == limit:
            self.finish("calls", f"the model made more than {limit} calls of tools")
        elif turn.role == Role.CALL:
            self._num_calls += 1
            self.call = turn.data

    def _check_length(self) -> None:
        limit = self._agent.limits.bytes
        if self._length >= limit:
            self.finish("bytes", f"the transcript has reached {limit} bytes")


def _converse(agent: Agent, talks: Sequence[_Conversation], stream: Stream | None) -> Stream | None:
    """Lets conversations go on until all have ended; returns their stream, or None if none began.

    Args:
      stream: of the conversations; None where they have just begun.
    """
    deadline = time.monotonic() + agent.limits.seconds
    live = [talk for talk in talks if talk.is_live]  # one may be too long from the start
    if stream is None and live:
        talks, stream = live, agent.begin(live)
    while stream is not None and any(talk.is_live for talk in talks):
        is_live = [talk.is_live for talk in talks]
        given = [talk.given if talk.is_live else [] for talk in talks]
        for talk, heard in zip(talks, stream.go_on(given, is_live)):
            if talk.is_live:
                talk.hear(*heard)
        calling = [talk for talk in talks if talk.is_live and talk.call is not None]
        if calling:
            calls = [(talk.index, talk.call or b"") for talk in calling]
            results = agent.results(calls, deadline - time.monotonic())
            for talk, result in zip(calling, results):
                talk.answer_call(result)
        if time.monotonic() > deadline:
            for talk in talks:
                talk.finish("time", f"it took more than {agent.limits.seconds:g} s")
    return stream
