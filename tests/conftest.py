"""JAX at its strictest for every test, and compiled quickly rather than well, and once."""

import atexit
import gc
import os
import pathlib
import shutil
import signal
import tempfile

import pytest

from tests import processes
from tests import type_checks as type_checks  # looked up by pyproject.toml's hook

# XLA sizes its thread pool by this; collectives between fake devices starve with fewer threads.
os.environ["PJRT_NPROC"] = "16"
# Processes that tests start choose their own flags.
os.environ.setdefault("XLA_FLAGS", processes.xla_flags())
# What several processes need, compiled programs and undisturbed runs, is made by one of them. The
# first process of a session makes this folder for it, and all others inherit it.
if "SPECTRAL_POD_TESTS" not in os.environ:
    shared = tempfile.mkdtemp(prefix="spectral_pod-tests-")
    atexit.register(shutil.rmtree, shared, ignore_errors=True)
    os.environ["SPECTRAL_POD_TESTS"] = shared
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{shared}/compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax

from spectral_pod.parallel import runtime

runtime.initialize(None, 1, 0)
# A shell starts what runs in the background with SIGINT ignored, and nohup with SIGHUP ignored;
# processes inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
pytest.register_assert_rewrite("tests.trainer", "tests.train.states", "tests.data.files")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing allocates much and leaves no cycles: looking for those took a tenth of its time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

# Folders and files by the time that they take. The workers take them in this order, so that none is
# left alone with a long file at the end.
LONGEST = (
    "test_chaos.py", "multidevice", "multiprocess", "test_main_errors.py", "train", "storage",
    "test_old_runs.py", "tools", "test_worked_example.py", "generate", "launch", "test_api.py",
    "models", "ops", "layers", "data",
)  # fmt: skip
TESTS = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    def place(item):
        names = item.path.name, item.path.relative_to(TESTS).parts[0]
        return min((LONGEST.index(name) for name in names if name in LONGEST), default=len(LONGEST))

    items.sort(key=place)
