"""What a user of the benchmarks can cure."""

from spectral_pod.errors import UserError


class BenchError(UserError):
    """A benchmark cannot run as asked."""
