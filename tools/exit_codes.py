"""Exit codes of the trainer (spectral_pod/errors.py); launch/exit_codes.sh has them for shells."""

_MEANINGS = {
    0: "done",
    1: "a bug: see the traceback",
    2: "a mistake in the command or configuration",
    3: "the numbers went bad",
    75: "preempted, state saved",
    76: "lost a peer",
    77: "stalled",
    78: "its time is up, state saved",
    126: "the command cannot be run",
    127: "the command cannot be run",
    130: "interrupted",
}
_SIGNALS = range(129, 193)  # shells add 128 to the signal's number, which is 64 at most


def meaning(code: int) -> str:
    if code in _MEANINGS:
        return _MEANINGS[code]
    return f"killed by signal {code - 128}" if code in _SIGNALS else "unknown"


def is_curable(code: int) -> bool:
    """Whether a restart can help."""
    return code in (75, 76, 77) or (code in _SIGNALS and code != 130)


def worse(one: int, other: int) -> int:
    """The worse of two codes; one that a restart cannot fix is worse than one that it can."""
    if one == 0 or (other != 0 and is_curable(one) and not is_curable(other)):
        return other
    return one
