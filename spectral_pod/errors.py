"""Exceptions that end a run: `main` prints the message and exits with the class's exit code.

    0    success
    1    a bug; the traceback is on stderr
    2    a user error: UserError
    3    a non-finite loss or gradient: NonFiniteError
    75   preempted, the state is saved: Preempted           restart to continue
    76   another process of the run is lost: LostPeerError  restart
    77   no progress for too long; stacks were written      restart
    130  Ctrl-C

JAX's runtime aborts a process (134) when the coordinator dies. That, and any other death by a
signal, also calls for a restart; `launch/supervise.sh` does it.
"""


class UserError(Exception):
    """The message says what is wrong, which field, file or host is at fault, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration is invalid: a misspelt field, an impossible mesh, a mismatched workdir."""


class DataError(UserError):
    """A data store is missing, damaged, or does not match the configuration."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or cannot be restored into this model."""


class NonFiniteError(UserError):
    """The loss or a gradient is NaN or infinite; the newest valid checkpoint is kept."""

    exit_code = 3


class Preempted(UserError):
    """SIGTERM was received; the current state, or else the last checkpoint, is saved."""

    exit_code = 75


class LostPeerError(UserError):
    """Another process of the run died, exited, or did not reach a barrier in time."""

    exit_code = 76


STALLED = 77
