"""Tools that a model may call, by name: functions whose parameters are typed.

    tools = Tools(calculator)

    @tools.add
    def weather(city: str, days: int = 1) -> str:
        "The forecast of a city."
        ...

    tools.call([b'weather {"city": "Oslo"}'])   # [b"rain"]

A call is the name of a tool, a space, and its arguments as a JSON object. They are checked against
the function's annotations before it is called. Whatever goes wrong, in the call or in the tool,
becomes the result, as text that begins with "error: ", so that the model can correct itself.

Functions run on threads of this process, and are trusted. One that does not end within the limit is
reported and left to itself. Code that a model writes runs elsewhere (`sandbox.py`).
"""

import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NotRequired, TypeVar, get_type_hints

import pydantic
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from spectral_pod import fields
from spectral_pod.agent.calculator import calculate
from spectral_pod.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])


class Tool(NamedTuple):
    """A function that a model may call.

    Attributes:
      function: returns text, bytes, or what JSON can hold.
      arguments: the schema of its arguments.
      description: its signature and the first line of its docstring.
    """

    function: Callable[..., Any]
    arguments: pydantic.TypeAdapter[dict[str, Any]]
    description: str


def calculator(expression: str) -> str:
    """Exact arithmetic: integers, decimals, + - * / // % ** and parentheses."""
    return calculate(expression)


class Tools:
    """Tools by name, and the limits on each call.

    Attributes:
      seconds: in which a call must end.
      output_bytes: of a result; what is longer is cut, and says so.
    """

    def __init__(
        self, *functions: Callable[..., Any], seconds: float = 10.0, output_bytes: int = 2000
    ):
        fields.check(fields.PositiveTime, seconds, "seconds")
        self.seconds, self.output_bytes = seconds, output_bytes
        self._tools: dict[str, Tool] = {}
        for function in functions:
            self.add(function)

    def add(self, function: Function, name: str = "") -> Function:
        """Adds a function, by default under its own name; returns it, as decorators do.

        Raises:
          ConfigError: a parameter has no annotation that JSON can be checked against, or cannot be
            given by name; or there is such a tool, or its name is not one word.
        """
        name = name or getattr(function, "__name__", "")
        if not name.isidentifier():
            raise ConfigError(f"a tool is named {name!r}; its name must be one word")
        if name in self._tools:
            raise ConfigError(f"there are two tools named {name!r}; give one another name")
        try:
            self._tools[name] = Tool(
                function, _arguments(name, function), _description(name, function)
            )
        except ConfigError:
            raise
        except Exception as error:  # annotations and defaults are code of others
            what = _reason(error)
            raise ConfigError(f"tool {name!r} has no signature that can be read: {what}") from error
        return function

    def __iter__(self) -> Iterator[str]:
        return iter(self._tools)

    def describe(self) -> str:
        """A line for each tool."""
        return "\n".join(tool.description for tool in self._tools.values())

    def call(self, calls: Sequence[bytes], *, seconds: float | None = None) -> list[bytes]:
        """The results of calls, which run at the same time. Nothing that a tool does is raised.

        Args:
          seconds: a limit besides that of the tools.
        """
        limit = self.seconds if seconds is None else max(0.0, min(seconds, self.seconds))
        results: dict[int, bytes] = {}

        def work(index: int, call: bytes) -> None:
            results[index] = self._result(call)

        threads = [
            # Daemons: a tool that does not end does not keep the process from ending.
            threading.Thread(target=work, args=item, name="tool", daemon=True)
            for item in enumerate(calls)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + limit
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = f"error: it did not end within {limit:g} s".encode()
        finished = dict(results)
        return [self._cut(finished.get(index, late)) for index in range(len(calls))]

    def _result(self, call: bytes) -> bytes:
        try:
            return _as_bytes(self._called(call))
        except BaseException as error:  # also SystemExit, which a tool may raise
            return b"error: " + _reason(error).encode(errors="replace")

    def _called(self, call: bytes) -> Any:
        name, _, given = call.partition(b" ")
        tool = self._tools.get(name.decode(errors="replace"))
        if tool is None:
            raise _CallError(f"there is no tool {_short(name)}; there are: {', '.join(self)}")
        try:
            arguments = tool.arguments.validate_json(given or b"{}", strict=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "arguments"
            raise _CallError(f"{where}: {first['msg']}; it is {tool.description}") from None
        return tool.function(**arguments)

    def _cut(self, result: bytes) -> bytes:
        left = len(result) - self.output_bytes
        if left <= 0:
            return result
        return result[: self.output_bytes] + f"\n... {left} more bytes".encode()


class _CallError(Exception):
    """A call that reaches no tool."""


def _arguments(name: str, function: Callable[..., Any]) -> pydantic.TypeAdapter[dict[str, Any]]:
    """The schema of a function's arguments."""
    parameters = inspect.signature(function).parameters.values()
    hints = get_type_hints(function, include_extras=True)
    members: dict[str, Any] = {}
    for one in parameters:
        if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            raise ConfigError(f"parameter {one} of tool {name!r} cannot be given by name")
        if one.name not in hints:
            raise ConfigError(f"parameter {one.name!r} of tool {name!r} has no type; annotate it")
        is_required = one.default is one.empty
        members[one.name] = hints[one.name] if is_required else NotRequired[hints[one.name]]
    schema = pydantic.with_config(extra="forbid")(_typed_dict(name, members))
    try:
        return pydantic.TypeAdapter(schema)
    except (pydantic.errors.PydanticUserError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"a parameter of tool {name!r} cannot be JSON: {reason}") from error


def _typed_dict(name: str, members: dict[str, Any]) -> Any:
    return TypedDict(name, members)  # type: ignore[operator]


def _description(name: str, function: Callable[..., Any]) -> str:
    about = (inspect.getdoc(function) or "").partition("\n")[0]
    return f"{name}{inspect.signature(function)}{': ' if about else ''}{about}"


def _as_bytes(result: Any) -> bytes:
    if isinstance(result, bytes):
        return result
    if isinstance(result, str):
        return result.encode(errors="replace")
    try:
        return json.dumps(result, ensure_ascii=False).encode(errors="replace")
    except (TypeError, ValueError, RecursionError) as error:
        raise _CallError(f"its result is no text and no JSON: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """An error in a line. Its text is the tool's, which may fail as well."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = ""
    kind = "" if isinstance(error, (_CallError, ValueError)) and text else type(error).__name__
    return ": ".join(filter(None, [kind, text]))


def _short(name: bytes) -> str:
    text = repr(name.decode(errors="replace"))
    return text if len(text) <= 60 else f"{text[:57]}..."
