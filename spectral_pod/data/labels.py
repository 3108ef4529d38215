"""The classes that labels name.

A label is the name of a class. Spaces around it do not count, nor does how a whole number or a
truth value is written: 1, 1.0, "1" and " 1.0" are one class in all files and splits, true and
"True" are another. An integer is the index of a class only where the user has named the classes and
none of the names is a number. What stands for a missing value is no label, unless the user has
named a class so.
"""

import collections
import dataclasses
import decimal
import functools
import math
import re
import unicodedata
from typing import Any

from spectral_pod.data.formats import Fault
from spectral_pod.data.text import encode
from spectral_pod.errors import DataError

MAX_CLASSES = 65_536
_MAX_FRACTIONS = 20  # distinct numbers with a fraction that may be classes, such as half stars
# An integer with a sign, with zeros after the point, or in the notation of `%e`; "01" and "1e5" are
# names, as of codes.
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-][0-9]{1,3})?")
_NUMERIC = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_MAX_DIGITS = 400
_MISSING = frozenset({  # what pandas reads as one; nan and null in any case
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NaT", "None", "n/a", "nan", "null",
})  # fmt: skip


def spelling(value: Any) -> str | None:
    """A label as text without spaces around it; None for what is no text, integer or number."""
    match value:
        case bytes():
            text = value.decode("utf-8", "backslashreplace").strip()
            return unicodedata.normalize("NFC", text) or None
        case bool():
            return str(value).lower()
        case float() | decimal.Decimal() if not math.isfinite(value):
            return None
        case float() if abs(value) >= 2**53:  # from there on different integers are equal floats
            return None
        case float() | decimal.Decimal() if value == int(value):
            return str(int(value))  # numbers beside a null are floats in some files
        case int() | float() | decimal.Decimal():
            return str(value)
    return None


def canonical(name: str) -> str:
    """What all spellings of one class have in common."""
    if len(name) <= _MAX_DIGITS and _NUMBER.fullmatch(name):
        number = decimal.Decimal(name)
        return str(int(number)) if number == number.to_integral_value() else name
    return name.lower() if name.lower() in ("true", "false") else name


def is_missing(name: str) -> bool:
    """Whether a text is what programs write for a missing value."""
    return name in _MISSING or name.lower() in ("nan", "-nan", "null")


def is_integer(name: str) -> bool:
    """Whether a name, in its canonical form, is an integer of at most 18 digits."""
    return re.fullmatch("-?[0-9]{1,18}", name) is not None


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a set of records.

    Attributes:
      names: in the order of their indices.
      stated: whether the user named them, rather than the training records.
    """

    names: tuple[str, ...]
    stated: bool = True

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """The index of each class by its canonical name; fewer, if names are of one class."""
        return {canonical(spelling(encode(n)) or ""): i for i, n in enumerate(self.names)}

    @functools.cached_property
    def _numbered(self) -> bool:
        return self.stated and not any(map(_NUMERIC.fullmatch, self.places))

    def index(self, value: Any, field: str, place: str) -> int | Fault:
        """The index of the class of a label, in this field of the record at `place`."""
        name = spelling(value)
        if name is None:
            return _no_label(value, field, place)
        name = canonical(name)
        if name in self.places:
            return self.places[name]
        if self._numbered and is_integer(name):
            if 0 <= int(name) < len(self.names):
                return int(name)
            reason = f"label out of range: {int(name)}, with {len(self.names)} classes"
            return Fault(place, reason)
        if is_missing(name):
            return _no_label(value, field, place)
        known = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
        whose = "" if self.stated else ", those of the training source,"
        return Fault(place, f"unknown label: {name[:80]!r}; the classes{whose} are {known}")


def _no_label(value: Any, field: str, place: str) -> Fault:
    kind = "null" if value is None else repr(value)[:40]
    reason = f"{kind}, not a name or an integer"
    if isinstance(value, bytes):
        text = value.decode("utf-8", "backslashreplace").strip()
        reason = (
            f"{text!r}, a missing value unless the option classes names it" if text else "empty"
        )
    elif isinstance(value, float) and math.isfinite(value):
        reason = f"{kind}, too large for a float to be exact"
    return Fault(place, f"no label: field {field!r} is {reason}")


class Found:
    """The classes that labels are found to name."""

    def __init__(self, field: str):
        self._field = field
        self._spellings: dict[str, str] = {}  # by canonical name; that name if they differ
        self._places: dict[str, str] = {}  # where the first of each class is
        self._counts = collections.Counter[str]()  # labels of each class

    def __len__(self) -> int:
        return len(self._spellings)

    def add(self, value: Any, place: str) -> Fault | None:
        """Adds the label of the record at `place`, unless it is none."""
        spelt = spelling(value)
        if spelt is None or is_missing(spelt):
            return _no_label(value, self._field, place)
        name = canonical(spelt)
        if self._spellings.setdefault(name, spelt) != spelt:
            self._spellings[name] = name
        self._places.setdefault(name, place)
        self._counts[name] += 1
        return None

    def classes(self, source: str) -> Classes:
        """The classes in order: integers by their value, other names as texts.

        Raises:
          DataError: there are fewer than two or too many, the labels are numbers to predict rather
            than classes, or two of them may be one class.
        """
        names = list(self._spellings.values())
        fractions = [name for name in self._spellings if _is_fraction(name)]
        repeated = sum(self._counts[name] for name in fractions) / 2  # each twice, on average
        if len(fractions) > min(_MAX_FRACTIONS, repeated):
            raise DataError(
                f"config.data.options.label: field {self._field!r} has {len(fractions)} different "
                f"numbers with a fraction, the first {fractions[0]!r} in "
                f"{self._places[fractions[0]]}. To predict numbers is regression, which is not "
                "supported; if they are classes, name all classes in config.data.options.classes"
            )
        if not 1 < len(names) <= MAX_CLASSES:
            amount = f"more than {MAX_CLASSES:,} values" if names else "no values"
            amount = f"the only value {names[0]!r}" if len(names) == 1 else amount
            raise DataError(
                f"config.data.options.label: field {self._field!r} has {amount} in {source}; "
                "classification needs 2 classes or more"
            )
        self._check_distinct()
        integers = all(map(is_integer, names))
        names.sort(key=lambda name: (int(name) if integers else 0, name))
        return Classes(tuple(names), stated=False)

    def _check_distinct(self) -> None:
        numbers: dict[decimal.Decimal, str] = {}
        for name in self._spellings:
            number = _number(name)
            other = number is not None and numbers.setdefault(number, name)
            if other and other != name:
                raise DataError(
                    f"{self._places[name]}: label {name!r} may be the same class as {other!r} in "
                    f"{self._places[other]}; write them alike, or name all classes in "
                    "config.data.options.classes"
                )


def _number(name: str) -> decimal.Decimal | None:
    """The value of a name that is a number or a truth value."""
    if name in ("true", "false"):
        return decimal.Decimal(name == "true")
    if len(name) <= _MAX_DIGITS and _NUMERIC.fullmatch(name):
        return decimal.Decimal(name)
    return None


def _is_fraction(name: str) -> bool:
    number = _number(name)
    return number is not None and number != number.to_integral_value()
