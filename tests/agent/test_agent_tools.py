"""Tools: typed arguments, limits, and errors that become results."""

import sys
import threading
from typing import Annotated, Literal

import pydantic
import pytest

from spectral_pod.agent.tools import Tools, calculator
from spectral_pod.errors import ConfigError


def weather(city: str, days: int = 1, *, unit: Literal["C", "F"] = "C") -> str:
    """The forecast of a city.

    More about it.
    """
    return f"{city} {days} {unit}"


def total(numbers: list[float]) -> float:
    return sum(numbers)


def result(call, *functions, **limits):
    tools = Tools(*(functions or (calculator, weather, total)), **limits)
    (text,) = tools.call([call.encode() if isinstance(call, str) else call])
    return text.decode()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ('calculator {"expression": "12*34"}', "408"),
        ('weather {"city": "Oslo"}', "Oslo 1 C"),
        ('weather {"city": "Ås", "days": 2, "unit": "F"}', "Ås 2 F"),
        ('total {"numbers": [1, 2.5]}', "3.5"),
        # Errors of the call
        ("", "error: there is no tool ''; there are: calculator, weather, total"),
        ("forecast {}", "error: there is no tool 'forecast'; there are: calculator, weather"),
        (b"\xff\x00" * 99, "error: there is no tool '"),
        ("weather", "error: city: Field required; it is weather(city: str, days: int = 1"),
        ("weather {", "error: arguments: Invalid JSON"),
        ("weather 3", "error: arguments: Input should be an object"),
        ('weather {"city": 3}', "error: city: Input should be a valid string"),
        ('weather {"city": "a", "days": "2"}', "error: days: Input should be a valid integer"),
        ('weather {"city": "a", "days": true}', "error: days: Input should be a valid integer"),
        ('weather {"city": "a", "unit": "K"}', "error: unit: Input should be 'C' or 'F'"),
        ('weather {"city": "a", "self": 1}', "error: self: Extra inputs are not permitted"),
        ('total {"numbers": [1, "2"]}', "error: numbers.1: Input should be a valid number"),
        ("total " + "[" * 100_000, "error: arguments: Invalid JSON"),
        # Errors of the tool
        ('calculator {"expression": "1/0"}', "error: division by zero"),
    ],
)
def test_calls(call, expected):
    assert result(call).startswith(expected)


class Hostile(Exception):
    def __str__(self):
        raise RuntimeError


def shadowing(self: int, json: int, model_fields: int = 2, _x: int = 3) -> list[int]:
    return [self, json, model_fields, _x]


def test_parameters_may_have_any_name():
    assert result('shadowing {"self": 1, "json": 2, "_x": 4}', shadowing) == "[1, 2, 2, 4]"


def raising(error):
    def broken() -> None:
        raise error

    return broken


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("x"), "error: KeyError: 'x'"),
        (ValueError("two\nlines"), "error: two lines"),
        (ValueError(), "error: ValueError"),
        (SystemExit(3), "error: SystemExit: 3"),
        (KeyboardInterrupt(), "error: KeyboardInterrupt"),
        (Hostile(), "error: Hostile"),
        (RecursionError("deep"), "error: RecursionError: deep"),
        (UnicodeError("\ud800"), "error: ?"),
    ],
)
def test_a_tool_that_raises_ends_nothing(error, text):
    assert result("broken {}", raising(error)) == text


def test_results_that_are_no_text():
    def give(what: Literal["bytes", "json", "object", "loop", "none"]) -> object:
        loop = []
        loop.append(loop)
        return {"bytes": b"\xff", "json": {"é": [1]}, "object": object(), "loop": loop}.get(what)

    tools = Tools(give)
    calls = [f'give {{"what": "{what}"}}'.encode() for what in ("bytes", "json", "none")]
    assert tools.call(calls) == [b"\xff", '{"é": [1]}'.encode(), b"null"]
    assert result('give {"what": "object"}', give).startswith("error: its result is no text")
    assert result('give {"what": "loop"}', give).startswith("error: its result is no text")


def test_output_is_cut():
    def much() -> str:
        return "x" * 10_000

    assert result("much {}", much, output_bytes=5) == "xxxxx\n... 9995 more bytes"
    assert result("much {}", raising(ValueError("y" * 50)), output_bytes=500).startswith("error")


def test_a_tool_that_does_not_end_is_reported_and_the_others_are_not():
    release = threading.Event()

    def wait() -> str:
        release.wait(30)
        return "late"

    def quick() -> str:
        return "done"

    tools = Tools(wait, quick, seconds=0.2)
    calls = [b"wait", b"quick", b"wait {}"]
    late = b"error: it did not end within 0.2 s"
    assert tools.call(calls) == [late, b"done", late]
    assert tools.call([b"wait"], seconds=0.1) == [b"error: it did not end within 0.1 s"]
    release.set()


def test_calls_run_at_the_same_time():
    barrier = threading.Barrier(3)

    def meet() -> int:
        return min(0, barrier.wait(20))

    assert Tools(meet, seconds=30).call([b"meet"] * 3) == [b"0"] * 3


def no_type(x) -> str:
    return ""


def packed(*numbers: int) -> str:
    return ""


def unknown_type(x: threading.Lock) -> str:  # type: ignore[valid-type]
    return ""


def missing_type(x: "threading.foo") -> str:  # type: ignore[name-defined]
    return ""


def half_a_type(x: "1 +") -> str:  # type: ignore[valid-type]
    return ""


def within_a_type(x: "list['foo']") -> str:  # type: ignore[name-defined] # noqa: F821
    return ""


def broken_pattern(x: Annotated[str, pydantic.Field(pattern="(")]) -> str:
    return ""


class Unprintable:
    def __repr__(self):
        raise OSError("no printer")


def unprintable(x: int = Unprintable()) -> str:  # type: ignore[assignment]
    return ""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (missing_type, "tool 'missing_type' has no signature that can be read: AttributeError"),
        (half_a_type, "tool 'half_a_type' has no signature that can be read: SyntaxError"),
        (within_a_type, "tool 'within_a_type' has no signature that can be read"),
        (broken_pattern, "tool 'broken_pattern' has no signature that can be read: SchemaError"),
        (unprintable, "tool 'unprintable' has no signature that can be read: OSError: no printer"),
        (no_type, "parameter 'x' of tool 'no_type' has no type; annotate it"),
        (unknown_type, "a parameter of tool 'unknown_type' cannot be JSON"),
        (packed, r"parameter \*numbers: int of tool 'packed' cannot be given by name"),
        (lambda: 1, "a tool is named '<lambda>'"),
        (calculator, "two tools named 'calculator'"),
        (sys.stdout, "a tool is named"),
    ],
)
def test_a_function_that_cannot_be_a_tool(function, message):
    with pytest.raises(ConfigError, match=message):
        Tools(calculator).add(function)


def test_times_are_bounded():
    with pytest.raises(ConfigError, match=r"seconds is 10000000000\.0; it must be below 1e9"):
        Tools(calculator, seconds=1e10)


def test_a_decorator_and_a_description():
    tools = Tools(calculator)

    @tools.add
    def double(x: int) -> int:
        return 2 * x

    assert double(2) == 4
    assert list(tools) == ["calculator", "double"]
    assert tools.describe().splitlines()[1] == "double(x: int) -> int"
    assert tools.describe().startswith("calculator(expression: str) -> str: Exact arithmetic")
