"""JAX at its strictest for every test, and compiled quickly rather than well."""

import gc
import os
import pathlib

import pytest

# XLA sizes its thread pool by this; collectives between fake devices starve with fewer threads.
os.environ["PJRT_NPROC"] = "16"
# Tests compile much and run little. Processes that tests start choose their own flags.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

import jax

from spectral_pod.parallel import runtime

runtime.initialize(None, 1, 0)
pytest.register_assert_rewrite("tests.trainer")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing allocates much and leaves no cycles: looking for those took a tenth of its time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

# Folders and files by the time that they take. The workers take them in this order, so that neither
# is left alone with a long file at the end.
LONGEST = (
    "multidevice", "multiprocess", "test_main_errors.py", "train", "storage", "tools", "generate",
    "data", "models", "layers", "launch",
)  # fmt: skip
TESTS = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    def place(item):
        first = item.path.relative_to(TESTS).parts[0]
        return LONGEST.index(first) if first in LONGEST else len(LONGEST)

    items.sort(key=place)
