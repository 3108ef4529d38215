"""What `tools.sweep` searches: fields of a configuration, and their values."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from spectral_pod.errors import ConfigError


class Space(NamedTuple):
    """The values of a field: some `choices`, as flags have them, or a range from `low` to `high`.

    Ranges are inclusive. Their values are whole numbers if `whole`, and uniform in the logarithm if
    `log`.
    """

    field: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    log: bool = False

    def suggest(self, trial: Any) -> str:
        """The value of a trial of Optuna, as a flag has it."""
        if self.choices:
            return str(trial.suggest_categorical(self.field, self.choices))
        if self.whole:
            low, high = int(self.low), int(self.high)
            return str(trial.suggest_int(self.field, low, high, log=self.log))
        return repr(trial.suggest_float(self.field, self.low, self.high, log=self.log))

    def ends(self) -> tuple[str, str]:
        """Two of its values, as flags have them."""
        if self.choices:
            return self.choices[0], self.choices[-1]
        if self.whole:
            return str(int(self.low)), str(int(self.high))
        return repr(self.low), repr(self.high)

    def __str__(self) -> str:
        if self.choices:
            return f"{self.field}={','.join(self.choices)}"
        low, high = (f"{x:g}" for x in (self.low, self.high))
        return f"{self.field}={low}..{high}{':log' if self.log else ''}"


# The values that models are usually searched over on the Long Range Arena.
DEFAULT = (
    Space("optimizer.learning_rate", low=1e-4, high=1e-2, log=True),
    Space("model.hidden_dim", ("256", "512")),
    Space("model.num_layers", ("4", "6", "8")),
    Space("model.mlp_expansion", ("2.0", "4.0")),
    Space("model.dropout", ("0.0", "0.1", "0.2")),
)


def parse(texts: Sequence[str]) -> tuple[Space, ...]:
    """The spaces of --vary=FIELD=A,B,C and --vary=FIELD=LOW..HIGH[:log].

    Raises:
      ConfigError: one is written otherwise, is empty, or names a field again.
    """
    found: dict[str, Space] = {}
    for text in texts:
        field, equals, values = text.partition("=")
        field = field.removeprefix("config.")
        if not (field and equals and values):
            raise ConfigError(f"--vary={text}: write FIELD=A,B,C, or FIELD=LOW..HIGH[:log]")
        if field in found:
            raise ConfigError(f"--vary={text}: {field} is varied already")
        found[field] = _parse_one(text, field, values)
    return tuple(found.values())


def _parse_one(text: str, field: str, values: str) -> Space:
    match = re.fullmatch(r"(.+?)\.\.(.+?)(:log)?", values)
    if not match:
        choices = _choices(values)
        if len(set(choices)) < 2:
            raise ConfigError(f"--vary={text}: there must be two values or more")
        return Space(field, choices)
    try:
        low, high = float(match[1]), float(match[2])
    except ValueError:
        raise ConfigError(f"--vary={text}: the ends of a range are numbers") from None
    log = match[3] is not None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"--vary={text}: a range is from a number to a higher one")
    if log and low <= 0:
        raise ConfigError(f"--vary={text}: a logarithmic range starts above 0")
    whole = all(re.fullmatch(r"[+-]?\d+", end) for end in match.groups()[:2])
    return Space(field, low=low, high=high, whole=whole, log=log)


def _choices(values: str) -> tuple[str, ...]:
    """The parts between commas that are in no parentheses: tuples are values, too."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts)
