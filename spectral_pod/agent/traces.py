"""Traces: files of conversations, one JSON object a line; and logs of other tools, made into them.

    {"format": "spectral_pod.trace/1", "end": "answered", "turns": [
        {"role": "user", "text": "what is 12*34?"},
        {"role": "call", "text": "calculator {\"expression\": \"12*34\"}"},
        {"role": "result", "text": "408"}, {"role": "answer", "text": "408"}]}

Roles and their order are those of `protocol.py`. A turn whose bytes are not UTF-8 has "base64" in
place of "text"; a last one that was cut off has "ended": false.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from spectral_pod import project_files
from spectral_pod.agent import protocol
from spectral_pod.agent.protocol import Role, Turn
from spectral_pod.errors import DataError

FORMAT = "spectral_pod.trace/1"


class Trace(NamedTuple):
    """A conversation, and how it ended.

    Attributes:
      turns: in order.
      end: of a conversation that an agent had: "answered", or which limit ended it: "calls",
        "bytes", "time"; "malformed" where the model wrote what is no turn. Otherwise "".
      note: the same in a sentence.
    """

    turns: tuple[Turn, ...]
    end: str = ""
    note: str = ""

    @property
    def answer(self) -> bytes | None:
        """The last answer, if the conversation ended with one."""
        last = self.turns[-1]
        return last.data if last.role == Role.ANSWER and last.ended else None


def to_line(trace: Trace) -> str:
    """A line of a file of traces, with its line break."""
    line: dict[str, Any] = {"format": FORMAT, "turns": [_to_json(turn) for turn in trace.turns]}
    line |= {name: x for name, x in (("end", trace.end), ("note", trace.note)) if x}
    return json.dumps(line, ensure_ascii=False) + "\n"


def from_line(raw: bytes) -> Trace:
    """The trace of a line.

    Raises:
      ValueError: it is damaged; says how.
      DataError: a turn cannot follow the one before it.
    """
    line = project_files.TRACE.content(raw)
    turns = tuple(_from_json(number, turn) for number, turn in enumerate(line["turns"], 1))
    protocol.check(turns)
    return Trace(turns, line.get("end", ""), line.get("note", ""))


def read(file: str) -> Iterator[Trace]:
    """The traces of a file on disk or gs://, in order. Empty lines do not count.

    Raises:
      DataError: a line is no trace (names it), or the file is missing or has none.
    """
    is_empty = True
    try:
        with epath.Path(file).open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                if raw.strip():
                    yield _at(f"{file}:{number}", raw)
                    is_empty = False
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{file} is no file of traces: {error.strerror}") from error
    if is_empty:
        raise DataError(f"{file} holds no traces")


def _at(place: str, raw: bytes) -> Trace:
    try:
        return from_line(raw)
    except (ValueError, DataError) as error:
        raise DataError(f"{place} is no trace: {error}; {project_files.TRACE.remedy}") from error


def _to_json(turn: Turn) -> dict[str, Any]:
    value: dict[str, Any] = {"role": turn.role.value}
    try:
        value["text"] = turn.data.decode()
    except UnicodeDecodeError:
        value["base64"] = base64.b64encode(turn.data).decode()
    return value if turn.ended else value | {"ended": False}


def _from_json(number: int, turn: project_files.TraceTurn) -> Turn:
    if ("text" in turn) == ("base64" in turn):
        raise ValueError(f"turn {number} must have either text or base64")
    try:
        data = turn["text"].encode() if "text" in turn else _decoded(turn["base64"])
    except ValueError as error:
        raise ValueError(f"turn {number}: {error}") from error
    return Turn(Role(turn["role"]), data, turn.get("ended", True))


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is damaged: {error}") from error


# ---- logs of other tools


class Converted(NamedTuple):
    """A conversation of a log.

    Attributes:
      place: where it was, such as "log.jsonl:3".
      trace: None where it cannot be converted.
      fault: why not; of a trace, what of it was left out, or "".
    """

    place: str
    trace: Trace | None
    fault: str


def convert(file: str) -> Iterator[Converted]:
    """Conversations from a log of tool calls, as chat programs write it.

    A conversation is a JSON object with the list `messages`. The file has one a line or, if its
    name ends with .json, is one such object or a list of them. Messages have the role

    - `user`, with text as `content`;
    - `assistant`: with `tool_calls`, its `content`, if any, is a thought, and each call is a turn,
      `NAME ARGUMENTS`, followed by its result, wherever in the log that is; without, it is the
      answer. `reasoning_content` becomes a thought before both;
    - `tool`, the result of the call `tool_call_id`;
    - `system` and `developer`, which are left out: a conversation has no such turn.

    Text may be given in parts, `[{"type": "text", "text": ...}]`. Anything else, such as pictures,
    refusals, calls without a result or arguments that are no JSON object, cannot be converted.

    Raises:
      DataError: the file is missing, or is no JSON.
    """
    try:
        raw = epath.Path(file).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(f"{file} is no log: {error.strerror}") from error
    for place, value in _conversations(file, raw):
        try:
            turns, left_out = _turns(value)
            protocol.check(turns)
            if not turns or turns[-1].role != Role.ANSWER:
                raise DataError("it does not end with an answer of the assistant")
        except DataError as error:
            yield Converted(place, None, str(error))
        else:
            note = f"{left_out} messages of the system left out" if left_out else ""
            yield Converted(place, Trace(tuple(turns)), note)


def _conversations(file: str, raw: bytes) -> Iterator[tuple[str, Any]]:
    """The JSON values of a log, with their places."""
    whole = file.endswith(".json")
    lines = enumerate(raw.split(b"\n"), 1)
    texts = [(f"{file}:{number}", line) for number, line in lines if line.strip()]
    if whole:
        texts = [(file, raw)]
    for place, text in texts:
        try:
            value = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is no JSON: {error}") from error
        if whole and isinstance(value, list):
            yield from ((f"{file}[{index}]", one) for index, one in enumerate(value))
        else:
            yield place, value


def _turns(value: Any) -> tuple[list[Turn], int]:
    """The turns of a conversation of a log, and how many messages were left out."""
    messages = value.get("messages") if isinstance(value, Mapping) else None
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) for one in messages):
        raise DataError("it has no list `messages` of objects")
    results, turns, left_out = _results(messages), [], 0
    for number, message in enumerate(messages, 1):
        name, role = f"message {number}", message.get("role")
        if role in ("system", "developer"):
            left_out += 1
        elif role == "user":
            turns.append(Turn(Role.USER, _text(message.get("content"), name)))
        elif role == "assistant":
            turns += _of_assistant(message, name, results)
        elif role != "tool":
            raise DataError(f"{name} has the role {role!r}, of which there is no turn")
    if results:
        raise DataError(f"the result of {next(iter(results))!r} belongs to no earlier call")
    return turns, left_out


def _results(messages: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The results of tools by the identifier of their call."""
    results: dict[str, bytes] = {}
    for number, message in enumerate(messages, 1):
        if message.get("role") == "tool":
            call = message.get("tool_call_id")
            if not isinstance(call, str) or call in results:
                raise DataError(f"message {number} has no tool_call_id of its own")
            results[call] = _text(message.get("content"), f"message {number}")
    return results


def _of_assistant(
    message: Mapping[str, Any], name: str, results: dict[str, bytes]
) -> Iterator[Turn]:
    """The turns of a message of the assistant, with results of its calls, taken from `results`."""
    for key in ("refusal", "function_call", "audio"):
        if message.get(key):
            raise DataError(f"{name} has {key!r}, of which there is no turn")
    content, calls = message.get("content"), message.get("tool_calls") or []
    if message.get("reasoning_content"):
        yield Turn(Role.THOUGHT, _text(message["reasoning_content"], name))
    if not calls:
        yield Turn(Role.ANSWER, _text(content, name))
        return
    if content:
        yield Turn(Role.THOUGHT, _text(content, name))
    for call in calls if isinstance(calls, list) else [None]:
        call = call if isinstance(call, Mapping) else {}
        identifier, function = call.get("id"), call.get("function")
        if not isinstance(function, Mapping) or not isinstance(identifier, str):
            raise DataError(f"{name} has a tool call without an `id` or a `function`")
        if identifier not in results:
            raise DataError(f"the call {identifier!r} of {name} has no result of its own")
        yield Turn(Role.CALL, _call(function, name))
        yield Turn(Role.RESULT, results.pop(identifier))


def _call(function: Mapping[str, Any], name: str) -> bytes:
    """NAME ARGUMENTS of a call, as `tools.py` reads it."""
    tool, arguments = function.get("name"), function.get("arguments")
    if not isinstance(tool, str) or not tool.isidentifier():
        raise DataError(f"{name} calls {tool!r}; a tool's name is one word, such as get_weather")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} has arguments of {tool} that are no JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"{name} has arguments of {tool} that are no JSON object")
    return _encoded(f"{tool} {json.dumps(arguments, ensure_ascii=False)}", name)


def _text(content: Any, name: str) -> bytes:
    """The text of a message, which may be in parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = "no text" if kind == "text" or kind is None else f"a part of type {kind!r}"
            raise DataError(f"{name} has {what} as its content; turns are text only")
        texts.append(part["text"])
    return _encoded("".join(texts), name)


def _encoded(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is no Unicode text: {error}") from error
