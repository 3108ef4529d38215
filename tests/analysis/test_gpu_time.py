"""The time of instructions on GPUs, on a program with times known by hand, and kernels' work."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from spectral_pod.analysis import gpu_time, hardware, hlo, hlo_cost
from spectral_pod.analysis.estimate import estimate
from spectral_pod.analysis.gpu_time import Work

# Achieved: 1e9 bytes/s, and 1e9 FLOP/s of bfloat16, half of it of TF32, a tenth of float32.
CHIP = dataclasses.replace(
    hardware.CHIPS["h100"], hbm_bandwidth=1e9 / hardware.GPU_PRICES.bandwidth,
    peak_flops=1e9 / hardware.GPU_PRICES.flops, float32_flops=1e8 / hardware.GPU_PRICES.flops,
    latency=0.5,
)  # fmt: skip
KERNEL = ("delta", (((1000,), 4000),), (((1000,), 4000),))
PROGRAM = """HloModule jit_step, num_partitions=1

%fused (p: f32[1000]) -> f32[1000] {
  ROOT %p = f32[1000]{0} parameter(0)
}

%gemm (a: bf16[100,1000], b: bf16[1000,100]) -> f32[100,100] {
  %a = bf16[100,1000]{1,0} parameter(0)
  %b = bf16[1000,100]{1,0} parameter(1)
  ROOT %dot = f32[100,100]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%turn (s: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %s = (s32[], f32[1000]{0}) parameter(0)
  %x = f32[1000]{0} get-tuple-element(%s), index=1
  %looped = f32[1000]{0} fusion(%x), kind=kLoop, calls=%fused
}

%cheap (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  ROOT %c = f32[1000]{0} copy(%x)
}

%rare (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %d = f32[1000]{0} copy(%x)
  ROOT %e = f32[1000]{0} copy(%d)
}

ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %a = bf16[100,1000]{1,0} parameter(1)
  %b = bf16[1000,100]{1,0} parameter(2)
  %f = f32[100,1000]{1,0} parameter(3)
  %g = f32[1000,100]{1,0} parameter(4)
  %c = c64[1000]{0} parameter(5)
  LINE
}
"""
PRODUCT = "f32[100,100]{1,0} dot(%f, %g), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
CALL = (
    'f32[1000]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", '
    'metadata={op_name="jit(step)/blocks/block_0/mixer/delta/pallas_call"}'
)


def program(line):
    return hlo.Program(PROGRAM.replace("LINE", f"%i = {line}"))


def estimated(read, kernels=None):
    return estimate(read, gpu_time.seconds(read, kernels or {}, CHIP), 0.0, CHIP)


@pytest.mark.parametrize(
    ("line", "seconds", "launches"),
    [
        ("f32[1000]{0} fusion(%x), kind=kLoop, calls=%fused", 0.5 + 8e-6, 1),
        ("f32[100,100]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm", 0.5 + 0.02, 1),
        (PRODUCT, 0.5 + 0.04, 1),
        (PRODUCT + ", operand_precision={high,high}", 0.5 + 0.12, 1),
        (PRODUCT + ", operand_precision={highest,highest}", 0.5 + 0.2, 1),
        ("c64[1000]{0} fft(%c), fft_type=FFT, fft_length={1000}", 0.5 + 498289e-9, 1),
        ("c64[1000]{0} fft(%c), fft_type=IFFT, fft_length={1000}", 1.0 + 514289e-9, 1),
        ("f32[1000]{0} all-reduce(%x), replica_groups={}, to_apply=%sum", 0.0, 0),
        ("f32[1000]{0} all-gather-start(%x), replica_groups={}", 0.0, 0),
        ("f32[1000]{0} bitcast(%x)", 0.0, 0),
        ("(s32[], f32[1000]{0}) while(%x), condition=%c, body=%turn, "
         'backend_config={"known_trip_count":{"n":"7"}}', 7 * (0.5 + 8e-6), 7),
        ("f32[1000]{0} conditional(%x), branch_computations={%rare, %cheap}", 0.5 + 8e-6, 1),
    ],
)  # fmt: skip
def test_a_launch_takes_its_latency_and_its_bytes_or_flops(line, seconds, launches):
    found = estimated(program(line))
    assert found.compiled_s == pytest.approx(seconds, rel=1e-6)
    assert found.launches == launches
    assert found.fallbacks_s == pytest.approx(0.5 + 8e-6 if "conditional" in line else 0.0)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mixer/delta", "blocks/block_0/mixer: delta"),
        ("transpose(jvp(delta))", "blocks/block_0, backward: delta"),
    ],
)
def test_a_kernel_takes_its_bytes_its_products_or_its_sums(name, what):
    sums = 2.0 / hardware.GPU_PRICES.sum_s
    for work, taken in ((Work(), 8e-6), (Work(flops=1e9), 1.0), (Work(flops=1e9, sums=sums), 2.0)):
        read = program(CALL.replace("mixer/delta", name))
        found = estimated(read, {KERNEL: work})
        assert found.kernels_s == pytest.approx(0.5 + taken)
        assert found.operations[0].what == what
        assert not read.notes
    read = program(CALL)
    assert estimated(read).kernels_s == pytest.approx(0.5 + 8e-6)
    assert read.notes == {"of the kernel delta only the bytes are known"}
    read = program(CALL)
    estimated(read, {KERNEL: Work(unknown=True)})
    assert read.notes == {"loops of unknown length in the kernel delta count once"}


def test_the_bound_counts_products_at_their_precision():
    read = program(PRODUCT + ", operand_precision={highest,highest}")
    assert hlo_cost.matrix_work(read, CHIP) == pytest.approx(10 * 2 * 100 * 100 * 1000)


def _recurrence(x_ref, y_ref):
    """The last four of five segments of eight tokens, and as many products as cells before."""

    def token(t, state):
        return state * jnp.sum(state * x_ref[...])

    def segment(g, state):
        return lax.fori_loop(g * 8, (g + 1) * 8, token, state)

    def product(_, state):
        return jnp.dot(state, state, preferred_element_type=jnp.float32)

    state = lax.fori_loop(1, 5, segment, x_ref[...])
    y_ref[...] = lax.fori_loop(0, pl.program_id(0), product, state)


def _search(x_ref, y_ref):
    y_ref[...] = lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x / jnp.sum(x), x_ref[...])


@pytest.mark.parametrize(
    ("body", "work"),
    [
        # Of three cells one has no product, one has one, and one has two, in float32: as TF32.
        (_recurrence, Work(flops=3 * 2 * 2 * 16**3, sums=32)),
        (_search, Work(sums=1, unknown=True)),
    ],
)
def test_the_work_of_a_kernel(body, work):
    block = pl.BlockSpec((16, 16), lambda i: (i, 0))
    x = jax.ShapeDtypeStruct((48, 16), jnp.float32)
    call = pl.pallas_call(
        body, name="delta", grid=(3,), in_specs=[block], out_specs=block, out_shape=x
    )
    found = gpu_time.kernels(jax.make_jaxpr(call)(x).jaxpr, CHIP)
    assert found == {("delta", (((48, 16), 3072),), (((48, 16), 3072),)): work}
