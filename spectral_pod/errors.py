"""Errors that a user can cause or cure: `main` prints their message and exits with their code."""


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
