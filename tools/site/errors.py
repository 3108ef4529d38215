"""The page of exit codes, errors and what to do about them."""

import errno
import inspect
import os
import re

from spectral_pod import errors
from tools.site.fields import cell, rows_of


def page() -> str:
    """Exit codes, the classes of errors, and the cures of errors that disks and limits cause."""
    table = re.findall(r"^ {4}(\d+) +(.*?)(?:  +(.*))?$", errors.__doc__ or "", re.MULTILINE)
    classes = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.UserError)
    ]
    cures = [
        (
            ", ".join(f"{os.strerror(number)} (`{errno.errorcode[number]}`)" for number in numbers),
            cure,
        )
        for numbers, cure in errors._CURES.items()
    ]
    return "\n\n".join(
        [
            "# Exit codes and errors",
            "A run or a tool that ends with a mistake of its user prints one line, `CLASS: what is "
            "wrong, and what to do`. [Messages and cures](../howto/messages.md) has those that are "
            "met most; those of Cloud TPU are in [its page](../pods.md#what-the-messages-mean).",
            "## Exit codes",
            rows_of(
                ("code", "meaning", "what to do"),
                [(f"`{code}`", cell(text), cell(cure)) for code, text, cure in table],
            ),
            "`launch/supervise.sh COMMAND` restarts a command where that helps. The tools end with "
            "the same codes, and with 141 where the reader of their output has left; those of "
            "`preflight` and `sanity` say what was found (`--help`).",
            "## Classes",
            rows_of(
                ("class", "code", "meaning"),
                [
                    (f"`{kind.__name__}`", f"`{kind.exit_code}`", cell(inspect.getdoc(kind) or ""))
                    for kind in classes
                ],
            ),
            "## Disks, limits and file servers",
            "A `StorageError` names the file and ends with what to do:",
            rows_of(("error of the system", "what to do"), cures),
        ]
    )
