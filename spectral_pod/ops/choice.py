"""What dispatch decides: the method of an operation, and why."""

from typing import NamedTuple


class Choice(NamedTuple):
    """A method and a phrase with the reason for it, which a run prints and records."""

    method: str
    reason: str

    def __str__(self) -> str:
        return f"{self.method} ({self.reason})"


def configured(method: str) -> Choice:
    return Choice(method, "as configured")
