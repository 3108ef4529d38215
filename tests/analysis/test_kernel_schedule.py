"""Schedules of kernels, printed by hand and by libtpu."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spectral_pod.analysis import hardware, kernel_schedule
from spectral_pod.analysis.kernel_schedule import Compiler, count

# Ten cells on a core: 2 bundles outside, in a cell 1 + 1 + 1 and two loops. The first has 1 bundle,
# and in a loop within it 3 and an empty one; the second loop has 1.
PRINTED = """
     0   :  { %6 = vsyncpa [#allocation4], 0 }
   0x1 LB: > { %s1 = sadd.s32 4294967295, %s9 /* iteration index, stage = 1 */ ;; \
%s2 = sadd.s32 4294967294, %s9 /* iteration index, stage = 2 */ }
   0x2 LB: >> { %s140 = sadd.s32 1, %s639 }
   0x3 LB: >>> { %v1 = vadd %v2 /* a long
comment, in which {0x7 :} is no bundle */ }
   0x4   : >> { %p1 = scmp.ge.s32.totalorder (%p2), %s140, 3 /* loop exit test */ }
   0x5   : >>> { %p2 = scmp.ge.s32.totalorder %s141, 5 /* loop exit test */ }
   0x6   :  {}
   0x7   : > { %p3 = pnand %p4, %p5 }
   0x8 LB: >> { %p6 = scmp.ge.s32.totalorder %s142, 7 /* loop exit test */ }
   0x9 PF: > { %p7 = scmp.ge.s32.totalorder %s20, 12 /* loop exit test */ }
   0xa   :  { %343 = vsyncpa [#allocation4], 1 } /* exit bundle: %k.1 = custom-call(%x.1) */
"""


def test_a_bundle_counts_for_every_trip_of_the_loops_around_it():
    first = 3 * (1 + 5 * 4)  # the empty bundle waits for the inner loop's branch
    assert count(PRINTED, (3, 5, 7)).cycles == 2 + 10 * (1 + first + 1 + 7 + 1)
    assert not count(PRINTED, (3, 5, 7)).note


def test_a_loop_that_depends_on_data_counts_once_and_is_reported():
    found = count(PRINTED, (3, 0, 7))
    assert found.cycles == 2 + 10 * (1 + 3 * (1 + 4) + 1 + 7 + 1)
    assert "depend on data" in found.note


def test_other_loops_than_the_kernels_are_an_error():
    with pytest.raises(ValueError, match="has 3 loops, its kernel 2"):
        count(PRINTED, (3, 5))


# ---- printed by libtpu


def add(x, out):
    out[...] = jnp.sin(x[...])


def repeated(trips, inner=0):
    def body(i, a):
        a = a * 1.5 + jnp.float32(i)
        return jax.lax.fori_loop(0, inner, body_of_inner, a) if inner else a

    def body_of_inner(i, a):
        return jnp.maximum(a, jnp.float32(i)) * 0.5

    def kernel(x, out):
        out[...] = jax.lax.fori_loop(0, trips, body, x[...])

    return kernel


def guarded(x, out):
    @pl.when(pl.program_id(0) == 0)
    def _():
        out[...] = jnp.zeros(out.shape)

    add(x, out)


def fallen_back(x, out):
    add(x, out)

    @pl.when(jnp.max(x[...]) > 9.0)
    def _():
        repeated(50)(x, out)


def until(x, out):
    out[...] = jax.lax.while_loop(lambda a: jnp.max(a) < 9.0, lambda a: 2 * a + 1, x[...])


def kernel(body, *grid, parallel=False):
    def call(x):
        block = pl.BlockSpec((8, 128), lambda *cell: (cell[0], 0))
        if not grid:
            block = pl.BlockSpec(memory_space=pltpu.VMEM)
        return pl.pallas_call(
            body, name="tested", grid=grid, in_specs=[block], out_specs=block,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=["parallel" if parallel else "arbitrary"] * len(grid)
            ),
        )(x)  # fmt: skip

    rows = 8 * grid[0] if grid else 8
    traced = jax.jit(call).trace(jax.ShapeDtypeStruct((rows, 128), jnp.float32))
    (found,) = kernel_schedule.kernels(traced.jaxpr.jaxpr)
    assert found.signature[0] == "tested"
    assert found.signature[1] == found.signature[2] == (((rows, 128), 4 * rows * 128),)
    return found


def cycles(topology, *kernels):
    with Compiler(hardware.parse(topology)) as compiler:
        return [compiler.schedule(kernel) for kernel in kernels]


def steps(found):
    """The differences of successive schedules, which must be equal: what they count for."""
    (step,) = {late.cycles - early.cycles for early, late in itertools.pairwise(found)}
    return step


libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@libtpu
def test_schedules_are_linear_in_cells_and_trips():
    grids = [(), (1,), (8,), (16,), (24,), (8, 3)]
    loops = [(kernel(repeated(n), 8)) for n in (6, 12, 18)]
    found = cycles("v5e:2x2", *(kernel(add, *grid) for grid in grids), *loops)
    assert all(one.cycles > 0 and not one.note for one in found)
    assert found[2].cycles > 4 * found[1].cycles  # a cell that is alone has no loop
    cell = steps(found[2:5]) / 8
    assert cell > 20
    assert found[5].cycles > 0.9 * 24 * cell
    assert steps(found[6:]) % (6 * 8) == 0


def test_fall_backs_on_data_are_left_out_and_conditions_on_the_cell_are_not():
    for grid in ((8,), (8, 3)):
        assert kernel(fallen_back, *grid).falls_back
        assert kernel(fallen_back, *grid).trips == kernel(add, *grid).trips == ()
        assert not kernel(guarded, *grid).falls_back
    assert kernel(repeated(4, 3), 8).trips == (4, 3)


def test_equal_kernels_are_one_and_interpreted_ones_are_none():
    def call(x, **options):
        block = pl.BlockSpec((8, 128), lambda i: (i, 0))
        return pl.pallas_call(
            add, name="tested", grid=(2,), in_specs=[block], out_specs=block,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), **options,
        )(x)  # fmt: skip

    x = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    traced = jax.jit(lambda x: call(call(call(x)), interpret=True)).trace(x)
    first, second = kernel_schedule.kernels(traced.jaxpr.jaxpr)
    assert first is second


@libtpu
@pytest.mark.slow
def test_loops_in_loops_conditions_and_cores():
    nested = [kernel(repeated(4, n), 8) for n in (3, 6, 9)]
    found = cycles(
        "v4:2x2x1", *nested, kernel(add, 8), kernel(guarded, 8), kernel(until, 8),
        kernel(add, 16, parallel=True), kernel(add, 16), kernel(fallen_back, 8),
    )  # fmt: skip
    assert steps(found[:3]) % (4 * 3 * 8) == 0
    plain, conditional, unknown, both, one, usual = found[3:]
    assert plain.cycles <= usual.cycles < 1.5 * plain.cycles
    assert "conditions on data" in usual.note
    assert conditional.cycles > plain.cycles
    assert "depend on data" in unknown.note
    assert 1.8 < one.cycles / both.cycles < 2.2  # two cores share what is parallel
