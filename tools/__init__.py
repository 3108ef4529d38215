"""Command-line tools: python -m tools.NAME --help."""

from spectral_pod import errors

errors.check_packages(__name__)
