"""JAX at its strictest for every test."""

import os

# XLA sizes its thread pool by this; collectives between fake devices starve with fewer threads.
os.environ["PJRT_NPROC"] = "16"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
