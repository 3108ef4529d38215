"""What the command line asks of a benchmark."""

import contextlib
from typing import NamedTuple

from .peers import Peers


class Settings(NamedTuple):
    quick: bool
    peers: Peers | None
    stack: contextlib.ExitStack  # closed at the end of the run
