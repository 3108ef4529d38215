"""JAX at its strictest for every test, and compiled quickly rather than well."""

import os

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
