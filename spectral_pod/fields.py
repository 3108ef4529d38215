"""Fields of configurations, declared once in dataclasses whose annotations state accepted values.

    @dataclasses.dataclass(frozen=True)
    class Options:
        encoding: Literal["symbol", "raw"] = "symbol"
        train: Positive = 96_000

The sections of `config.py`, mixers (`layers/mixer.py`) and tasks (`data/tasks`) declare fields this
way; `check` validates values, and `parse` reads them from a command line.
"""

import ast
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from spectral_pod.errors import ConfigError

_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Bound(NamedTuple):
    """The numbers that a field accepts, `least` <= number < `below`, and how a message says so."""

    least: float
    below: float
    meaning: str

    def check(self, number: float, field: str) -> None:
        if not self.least <= number < self.below:
            raise ConfigError(f"{field} is {number}; it must be {self.meaning}")


_INF = float("inf")
_SMALL = Bound(-_INF, 2**31, "below 2**31")  # counts and sizes are int32 on devices
Positive = Annotated[int, Bound(1, _INF, "at least 1"), _SMALL]
NonNegative = Annotated[int, Bound(0, _INF, "0 or more"), _SMALL]
PositiveFloat = Annotated[float, Bound(math.nextafter(0, 1), _INF, "above 0")]
NonNegativeFloat = Annotated[float, Bound(0, _INF, "0 or more")]
# Of waits, which the system counts in 64 bits of nanoseconds. 1e9 s are 31 years.
_WAITED = Bound(-_INF, 1e9, "below 1e9")
PositiveTime = Annotated[float, Bound(math.nextafter(0, 1), _INF, "above 0"), _WAITED]
NonNegativeTime = Annotated[float, Bound(0, _INF, "0 or more"), _WAITED]
Fraction = Annotated[float, Bound(0, 1, "in [0, 1)")]
Share = Annotated[float, Bound(math.nextafter(0, 1), math.nextafter(1, 2), "above 0, up to 1")]
Probability = Annotated[float, Bound(0, math.nextafter(1, 2), "in [0, 1]")]


def types_of(fields: Any) -> dict[str, Any]:
    """The annotations of those fields of a dataclass that its constructor takes, by name."""
    hints = typing.get_type_hints(fields, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(fields) if field.init}


def check(annotation: Any, value: Any, field: str) -> None:
    """Checks a value against the annotation of its field.

    Args:
      field: the full name of the field, such as "config.data.seq_len".

    Raises:
      ConfigError: the field does not accept the value; the message names both and what is accepted.
    """
    if get_origin(annotation) is Literal:
        one_of(field, value, get_args(annotation))
        return
    rules: Sequence[Any] = ()  # which check further: `Bound`, `storage.Place`
    if get_origin(annotation) is Annotated:
        annotation, *rules = get_args(annotation)
    if not _is(value, annotation):
        raise ConfigError(f"{field} is {shown(value)}; it must be {_named(annotation)}")
    if annotation is float and not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{field} is {shown(value)}; it must be a finite number")
    for rule in rules:
        rule.check(value, field)


def check_all(instance: Any) -> None:
    """Checks the fields of a dataclass by their annotations, as it is made; raises as `check`."""
    for name, annotation in types_of(type(instance)).items():
        check(annotation, getattr(instance, name), name)


def one_of(field: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises a ConfigError for a value that is no choice; it lists the choices and suggests one."""
    choices = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):  # True == 1
        texts = [choice for choice in choices if isinstance(choice, str)]
        near = hint(value, texts) if isinstance(value, str) else ""
        raise ConfigError(f"{field} is {shown(value)}; known are {sorted(choices)}{near}")


def shown(value: Any) -> str:
    """A value in a message: one line of at most 200 letters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def hint(word: str, words: Iterable[str]) -> str:
    """'; did you mean ...?' with the closest of `words`, or '' if none is close."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def parse(annotation: Any, text: str, field: str) -> Any:
    """Parses a value from the command line.

    Raises:
      ConfigError: the text is not of the field's type, or the field does not accept its value.
    """
    if annotation is bool and text.lower() in _BOOLEANS:  # as absl reads those of other fields
        value: Any = _BOOLEANS[text.lower()]
    elif _is(text, annotation) and not (text.startswith("(") and _is((), annotation)):
        value = text
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if get_origin(annotation) is tuple and not isinstance(value, (tuple, list)):
            value = (value,)
    value = conformed(annotation, value)
    check(annotation, value, field)
    return value


def conformed(annotation: Any, value: Any) -> Any:
    """Converts lists to tuples, and an int to a float if the annotation is float: JSON and users do
    not distinguish them, but equal values must have equal hashes."""
    if isinstance(value, (list, tuple)):
        return tuple(conformed(Any, item) for item in value)
    kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return float(value) if kind is float and type(value) is int else value


def _is(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type; an int also counts as a float, and a list as a tuple."""
    if annotation is Any:
        return True
    if isinstance(annotation, types.UnionType):
        return any(_is(value, one) for one in get_args(annotation))
    if annotation in (None, type(None)):
        return value is None
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return value in get_args(annotation)
    if origin is Annotated:
        return _is(value, get_args(annotation)[0])
    if isinstance(value, bool):
        return origin is bool
    if origin is float:
        return isinstance(value, (int, float))
    if origin is tuple:
        kinds = get_args(annotation)
        if not isinstance(value, (tuple, list)):
            return False
        if kinds[1:] == (...,):
            kinds = kinds[:1] * len(value)
        return not kinds or (len(kinds) == len(value) and all(map(_is, value, kinds)))
    return isinstance(value, origin)


def _named(annotation: Any) -> str:
    """The name of a type in messages, such as "an int or None"."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(_named(one) for one in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a {annotation}"
    names = {bool: "True or False", int: "an int", float: "a number", str: "text"}
    return (names | {None: "None", type(None): "None"}).get(annotation, str(annotation))
