"""What ends a run: `main` prints its message and exits with its code.

    0    done
    1    a bug: the traceback is on stderr
    2    the user's mistake: UserError
    3    the numbers went bad: NonFiniteError
    75   preempted: what was learnt is saved         start again, it continues
    76   another process of the run is gone          start again
    77   nothing moved for too long; stacks written  start again
    130  Ctrl-C

JAX's runtime aborts (134) a process whose coordinator died: that, and any other death by a signal,
is to be started again too. `launch/supervise.sh` does.
"""


class UserError(Exception):
    """Says what is wrong, which field, file or host is at fault, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration cannot run: a misspelt field, an impossible mesh, a foreign workdir."""


class DataError(UserError):
    """A data store is missing, damaged, or does not hold what the configuration asks for."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or what is there cannot be restored into this model."""


class NonFiniteError(UserError):
    """The loss or a gradient stopped being a number; the newest sound checkpoint is kept."""

    exit_code = 3


class Preempted(UserError):
    """SIGTERM came: the state is saved, or what was saved before is kept."""

    exit_code = 75


class LostPeerError(UserError):
    """Another process of the run died, left, or did not arrive in time."""

    exit_code = 76


STALLED = 77
