"""The settings of a benchmark."""

import contextlib
from typing import NamedTuple

from .peers import Peers


class Settings(NamedTuple):
    quick: bool
    peers: Peers | None
    stack: contextlib.ExitStack  # closes at the end of the run
