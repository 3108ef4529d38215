"""Types are checked wherever a function is defined, also again and with other types."""

import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Float, Int

from spectral_pod.ops import gelu
from tests import type_checks


def defined(kind, default=0):
    @jaxtyping.jaxtyped(typechecker=type_checks.checked)
    def double(x: kind, times: int = default) -> kind:
        return x * 2 if x.ndim < 3 else "no array"

    return double


def test_each_definition_is_checked_by_its_own_types():
    numbers, kinds = jnp.ones((2, 3)), (Float[jnp.ndarray, "a b"], Int[jnp.ndarray, "a b"])
    for _ in range(2):
        of_floats, of_integers = map(defined, kinds)
        assert of_floats(numbers).sum() == 12
        assert of_integers(numbers.astype(int)).sum() == 12
        with pytest.raises(jaxtyping.TypeCheckError, match="double"):
            of_floats(numbers.astype(int))
        with pytest.raises(jaxtyping.TypeCheckError, match="double"):
            of_integers(numbers)
        with pytest.raises(jaxtyping.TypeCheckError, match="times"):
            of_floats(numbers, times="twice")
        with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
            defined(Float[jnp.ndarray, "..."])(jnp.ones((1, 1, 1)))


def test_the_project_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError, match="gelu"):
        gelu._tanh("no array")
