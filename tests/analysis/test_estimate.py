"""The estimate of a step's time on TPUs, on a program with times known by hand."""

import dataclasses

import pytest

from spectral_pod.analysis import hlo, tpu_time
from spectral_pod.analysis.estimate import estimate
from spectral_pod.analysis.hardware import CHIPS
from spectral_pod.analysis.kernel_schedule import Schedule
from spectral_pod.analysis.provenance import layer

CHIP = dataclasses.replace(CHIPS["v5e"], clock=1e6, hbm_bandwidth=1e9, latency=0.5)
BLOCK = "jit(train_step)/jvp(Model)/while/body/closed_call/blocks/block_0"
BACKWARD = BLOCK.replace("jvp(Model)", "transpose(jvp(Model))")
KERNEL = ("mixed", (((1000,), 4000),), (((1000,), 4000),))


def instruction(name, kind, operands="%x", cycles=0, source="", result="f32[1000]{0}", more=""):
    config = f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return (
        f"  %{name} = {result} {kind}({operands}){more}"
        + f', metadata={{op_name="{source}"}}' * bool(source)
        + config * bool(cycles)
    )


def call(name):
    source = f"{BLOCK}/mixer/mixer.prefill/{name}/pallas_call"
    return instruction(
        f"{name}.1", "custom-call", source=source, more=', custom_call_target="tpu_custom_call"'
    )


def program(*lines):
    fused = "%f (p: f32[1000]) -> f32[1000] {\n  ROOT %p = f32[1000]{0} parameter(0)\n}"
    turn = "%turn (s: (s32[], f32[1000])) -> (s32[], f32[1000]) {\n"
    turn += "  %s = (s32[], f32[1000]{0}) parameter(0)\n"
    turn += "  %x = f32[1000]{0} get-tuple-element(%s), index=1\n"
    turn += instruction("looped", "fusion", cycles=2_000_000, more=", kind=kLoop, calls=%f",
                        source=f"{BACKWARD}/feed_forward/add")  # fmt: skip
    cheap, rare = (
        f"%{name} (x: f32[1000]) -> f32[1000] {{\n  %x = f32[1000]{{0}} parameter(0)\n"
        + instruction(name + "_1", "fusion", cycles=cycles, more=", calls=%f")
        for name, cycles in (("cheap", 1_000_000), ("rare", 9_000_000))
    )
    entry = "ENTRY %main (x: f32[1000]) -> f32[1000] {\n  %x = f32[1000]{0} parameter(0)\n"
    body = "\n".join(lines)
    parts = [fused, f"{turn}\n}}", f"{cheap}\n}}", f"{rare}\n}}", f"{entry}{body}\n}}"]
    return hlo.Program("\n\n".join(["HloModule m", *parts]))


def seconds(*lines, schedules=None, network_s=0.0):
    return estimated(program(*lines), schedules or {}, network_s)


def estimated(read, schedules, network_s=0.0):
    return estimate(read, tpu_time.seconds(read, schedules, CHIP), network_s, CHIP)


BYTES = 8e-6  # 4 kB read and as many written


@pytest.mark.parametrize(
    ("line", "compiled_s"),
    [
        (instruction("a", "fusion", cycles=3_000_000, more=", calls=%f"), 3.0),
        (instruction("a", "fusion", cycles=1, more=", calls=%f"), BYTES),
        (instruction("a", "copy"), 0.5 + BYTES),
        (instruction("a", "add", result="f32[1000]{0:S(1)}", operands=""), 0.0),
        (instruction("a", "copy-start", result="(f32[1000]{0}, f32[1000]{0}, u32[])"), 0.0),
        (instruction("a", "all-reduce", more=", replica_groups={}"), 0.0),
        (
            instruction("w", "while", more=", condition=%c, body=%turn, backend_config="
                        '{"known_trip_count":{"n":"7"}}'),
            14.0,
        ),
        (instruction("c", "conditional", more=", branch_computations={%rare, %cheap}"), 1.0),
    ],
)  # fmt: skip
def test_an_instruction_takes_its_cycles_or_its_bytes(line, compiled_s):
    found = seconds(line)
    assert found.compiled_s == pytest.approx(compiled_s)
    assert found.kernels_s == 0
    assert found.fallbacks_s == pytest.approx(8.0 if "conditional" in line else 0.0)


def test_a_kernel_takes_its_schedule_or_its_bytes():
    known = seconds(call("mixed"), schedules={KERNEL: Schedule(4_000_000)})
    assert (known.kernels_s, known.compiled_s) == (pytest.approx(4.5), 0)
    other = program(call("other"))
    found = estimated(other, {KERNEL: Schedule(4_000_000)})
    assert found.kernels_s == pytest.approx(0.5 + BYTES)
    assert any("the kernel other has no schedule" in note for note in other.notes)


def test_the_parts_add_up_and_the_costliest_layers_come_first():
    lines = [
        instruction("w", "while", more=", condition=%c, body=%turn, backend_config="
                    '{"known_trip_count":{"n":"7"}}'),
        call("mixed"),
        instruction("a", "fusion", cycles=500_000, more=", calls=%f"),
    ]  # fmt: skip
    found = seconds(*lines, schedules={KERNEL: Schedule(4_000_000)}, network_s=1.0)
    assert found.step_s == pytest.approx(14.0 + 4.5 + 0.5 + 1.0)
    rows = [(one.what, one.runs, one.share) for one in found.operations]
    assert rows == [
        ("blocks/block_0/feed_forward, backward", 7, pytest.approx(0.7)),
        ("blocks/block_0/mixer: mixed", 1, pytest.approx(0.225)),
        ("outside of layers", 1, pytest.approx(0.025)),
    ]
    assert found.launches == 9


def test_bytes_in_the_background_are_the_least_time():
    start = instruction("a", "copy-start", result="(f32[1000]{0}, f32[1000]{0}, u32[])")
    found = seconds(start, network_s=1e-6)
    assert found.step_s == pytest.approx(found.memory_s + 1e-6)
    assert found.memory_s == pytest.approx(BYTES, rel=0.01)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (f"{BLOCK}/mixer/mixer.prefill/in/dot_general", "blocks/block_0/mixer"),
        (f"{BACKWARD}/mixer/add", "blocks/block_0/mixer, backward"),
        (
            "jit(f)/transpose(jvp(Model))/checkpoint/rematted_computation/blocks/block_1/norm/mul",
            "blocks/block_1/norm, again for the backward pass",
        ),
        ("jit(train_step)/add", "outside of layers"),
        ("", "outside of layers"),
    ],
)
def test_layers(source, name):
    assert layer(source) == name
