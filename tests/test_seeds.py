"""Any integer is a seed, and counts as a whole."""

import itertools

import jax
import numpy as np

from spectral_pod.seeds import entropy, random_key

SEEDS = [0, 1, 5, -1, -5, 2**31 + 5, 2**32 + 5, 2**32, 2**64 + 5, -(2**32) - 5, 10**30]


def test_seeds_differ():
    keys = [tuple(jax.random.key_data(random_key(seed)).tolist()) for seed in SEEDS]
    draws = [np.random.default_rng(entropy(seed)).random() for seed in SEEDS]
    for values in (keys, draws):
        assert all(a != b for a, b in itertools.combinations(values, 2))


def test_ordinary_seeds_are_those_of_jax_and_numpy():
    for seed in (0, 5, 2**31 + 5):
        assert (
            jax.random.key_data(random_key(seed)) == jax.random.key_data(jax.random.key(seed))
        ).all()
        assert entropy(seed) == seed
