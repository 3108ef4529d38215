"""The kernels compile for every generation of TPUs, on each device's own share of the data."""

import importlib.util
import json
import sys

import pytest

from tests import processes, trainer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
QUICK = {"v5e:2x2": [(300, 300, "bfloat16", 1)]}
SLOW = {
    "v4:2x2x1": [
        (2048, 2048, "bfloat16", 1), (4096, 4096, "bfloat16", 1), (2048, 2048, "float32", 1),
    ],
    "v5e:2x2": [
        (512, 512, "float32", 1), (8192, 8192, "bfloat16", 1), (16_384, 256, "bfloat16", 1),
    ],
    "v5p:2x2x1": [(2048, 2048, "bfloat16", 2), (4096, 1000, "float32", 1)],
    "v6e:2x2": [(2048, 2048, "bfloat16", 2), (8192, 8192, "bfloat16", 1)],
}  # fmt: skip


def compile_all(topology, cases):
    """For each case the custom calls and collectives of a forward and backward pass, sharded."""
    from spectral_pod.analysis import hardware

    parsed = hardware.parse(topology, 1)
    hardware.prepare(parsed)
    import jax

    from spectral_pod.analysis import hlo
    from spectral_pod.ops.long_conv import causal_conv, resolve
    from spectral_pod.parallel.mesh import AXES, make_mesh, on_mesh
    from spectral_pod.parallel.sharding import spec

    def measured(length, num_taps, dtype, sequence):
        sizes = {"data": 4 // sequence, "sequence": sequence}
        mesh = make_mesh({axis: sizes.get(axis, 1) for axis in AXES}, hardware.devices(parsed))

        def both(u_BDN, h_DT, dy_BDN):
            y_BDN, pullback = jax.vjp(lambda u, h: causal_conv(u, h, "toeplitz"), u_BDN, h_DT)
            return y_BDN, *pullback(dy_BDN)

        def array(shape, dtype, *axes):
            sharding = jax.sharding.NamedSharding(mesh, spec(*axes))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        with on_mesh(mesh):
            # At least 32 sequences a chip: the largest grid cells that are planned must fit.
            u = array((128, 256, length), dtype, "batch", "channel", "position")
            h = array((256, num_taps), "float32", None, None)
            lowered = jax.jit(both).trace(u, h, u).lower(lowering_platforms=("tpu",))
            shapes = (length, num_taps), (2**17, 2**17)
            chosen = [resolve("auto", *shape, dtype).method for shape in shapes]
            program = hlo.Program(lowered.compile().as_text())
        calls = [i.name for i, _ in program.runs(lambda i: 1.0) if i.opcode == "custom-call"]
        return {
            "chosen": chosen,
            "kernels": sum(name.startswith("toeplitz_") for name in calls),
            "collectives": sorted({c.kind for c in hlo.collectives(program)}),
        }

    return [measured(*case) for case in cases]


def in_a_process(function, *arguments):
    command = [sys.executable, __file__, json.dumps([function, *arguments])]
    done = processes.run(
        command, cwd=trainer.ROOT, env=trainer.environment(), capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("topology", "cases"),
    [*QUICK.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())],
)
def test_a_sharded_pass_has_two_kernels_and_moves_only_what_it_must(topology, cases):
    for case, found in zip(cases, in_a_process("compile_all", topology, cases), strict=True):
        assert found["kernels"] == 2, case
        # Of short sequences another method is faster; long ones do not fit on the chip.
        fits = "toeplitz" if case[0] >= 512 else "matmul"
        assert found["chosen"] == [fits, "matmul"], case
        exchanged = ["all-to-all"] if case[-1] > 1 else []
        assert found["collectives"] == ["all-reduce", *exchanged], case


def compile_filter(topology):
    """The kernels of a small spectral filter of odd sizes, sequences split over two devices."""
    from spectral_pod.analysis import hardware

    parsed = hardware.parse(topology, 1)
    hardware.prepare(parsed)
    import jax

    from spectral_pod.analysis import hlo
    from spectral_pod.ops.fft import spectral_filter
    from spectral_pod.parallel.mesh import AXES, make_mesh, on_mesh
    from spectral_pod.parallel.sharding import spec

    sizes = {"data": 2, "sequence": 2}
    mesh = make_mesh({axis: sizes.get(axis, 1) for axis in AXES}, hardware.devices(parsed))

    def both(x_BND, re_FD, im_FD, dy_BND):
        def run(x_BND, re_FD, im_FD):
            return spectral_filter(x_BND, jax.lax.complex(re_FD, im_FD), 256, "butterfly")

        y_BND, pullback = jax.vjp(run, x_BND, re_FD, im_FD)
        return y_BND, *pullback(dy_BND)

    def array(shape, dtype, *axes):
        sharding = jax.sharding.NamedSharding(mesh, spec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    with on_mesh(mesh):
        x = array((6, 100, 300), "bfloat16", "batch", "position", "channel")
        w = array((129, 300), "float32", None, None)
        lowered = jax.jit(both).trace(x, w, w, x).lower(lowering_platforms=("tpu",))
        program = hlo.Program(lowered.compile().as_text())
    calls = [i.name for i, _ in program.runs(lambda i: 1.0) if i.opcode == "custom-call"]
    kernels = sorted(name.partition(".")[0] for name in calls if name.startswith("butterfly"))
    return [kernels, sorted({c.kind for c in hlo.collectives(program)})]


def test_a_filter_of_odd_sizes_compiles():
    kernels, collectives = in_a_process("compile_filter", "v5e:2x2")
    assert kernels == ["butterfly_backward", "butterfly_forward"]
    assert collectives == ["all-reduce", "all-to-all"]


# Positions, dtype, devices that share a sequence. The largest of each generation, and one whose
# sequences are split.
STEPS = {
    "v4:2x2x1": [(2048, "bfloat16", 1), (1024, "float32", 1)],
    "v5e:2x2": [(8192, "bfloat16", 1), (2048, "float32", 2)],
    "v5p:2x2x1": [(4096, "bfloat16", 2), (2048, "float32", 1)],
    "v6e:2x2": [(8192, "float32", 1), (2048, "bfloat16", 2)],
}
TOO_LARGE = {"v4": (4096, "bfloat16"), "v5e": (16_384, "bfloat16"), "v5p": (8192, "bfloat16"),
             "v6e": (16_384, "bfloat16")}  # fmt: skip


def compile_steps(topology, cases):
    """For each case what surrounds the kernels of spectral filters in a real training step: two
    layers in a scan, rematerialized."""
    from spectral_pod.analysis import hardware

    parsed = hardware.parse(topology, 1)
    hardware.prepare(parsed)
    from collections import Counter

    from spectral_pod.analysis import hlo
    from spectral_pod.config import default
    from spectral_pod.ops import fft
    from spectral_pod.parallel.mesh import on_mesh
    from tools import compiled_step

    def measured(length, dtype, sequence):
        config = default()
        config.update_from_flattened_dict({
            "data.task": "listops", "data.seq_len": 4 * length, "train.global_batch_size": 16,
            "train.eval_batch_size": 16, "mesh.sequence": sequence, "model.num_layers": 2,
            "model.pattern": ("spectral",), "model.remat": "full", "model.dtype": dtype,
        })  # fmt: skip
        setup = compiled_step.set_up(config, parsed)
        with on_mesh(setup.mesh):
            chosen = [fft.resolve("auto", n, size, dtype, 256).method for n, size, dtype in (
                (length, 2 * length, dtype), (600, 1200, dtype), (length, length, dtype),
                *((n, 2 * n, kind) for n, kind in [TOO_LARGE[parsed.chip.family]]),
            )]  # fmt: skip
        program = hlo.Program(setup.lowered["train"].compile().as_text())
        runs, around = Counter(), set()
        for call, count in program.runs(lambda i: 1.0):
            name = call.name.partition(".")[0]
            if call.opcode == "custom-call" and name.startswith("butterfly"):
                runs[name] += count
                activations = program.operands(call)[3:]
                around |= {operand.opcode for operand in activations}
        exchanged = [c for c in hlo.collectives(program) if c.kind == "all-to-all"]
        return {
            "chosen": chosen, "runs": runs, "around": sorted(around), "exchanged": len(exchanged),
        }  # fmt: skip

    return [measured(*case) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "cases"), STEPS.items())
def test_a_spectral_step_runs_its_kernels_on_activations_as_they_are(topology, cases):
    for case, found in zip(cases, in_a_process("compile_steps", topology, cases), strict=True):
        # Those of two layers, and the forward ones again in the backward pass.
        assert found["runs"] == {"butterfly_forward": 4, "butterfly_backward": 2}, case
        assert found["chosen"] == ["butterfly", "matmul", "butterfly", "matmul"], case
        assert not {"copy", "transpose"} & set(found["around"]), case
        assert bool(found["exchanged"]) == (case[-1] > 1), case


def compile_attention(topology, cases):
    """For each case how often attention's kernels run in a real training step, by name: two layers
    in a scan, rematerialized; and why dispatch chose what it did."""
    from spectral_pod.analysis import hardware

    parsed = hardware.parse(topology, 1)
    hardware.prepare(parsed)
    from collections import Counter

    from spectral_pod import models
    from spectral_pod.analysis import hlo
    from spectral_pod.config import default
    from spectral_pod.parallel.mesh import on_mesh
    from tools import compiled_step

    def measured(length, fields):
        config = default()
        config.update_from_flattened_dict({
            "data.task": "copy", "data.seq_len": length, "model.name": "spectral_gpt",
            "train.global_batch_size": 16, "train.eval_batch_size": 16, "model.num_layers": 2,
            "model.pattern": ("attention",), "model.remat": "full", "model.dtype": "bfloat16",
        } | fields)  # fmt: skip
        setup = compiled_step.set_up(config, parsed)
        with on_mesh(setup.mesh):
            choice = models.operations(config)["attention"]
        program = hlo.Program(setup.lowered["train"].compile().as_text())
        runs = Counter()
        for call, count in program.runs(lambda i: 1.0):
            if call.opcode == "custom-call" and call.name.startswith("flash_"):
                runs[call.name.partition(".")[0].partition("_block")[0]] += count
        gathered = any(c.kind == "all-gather" for c in hlo.collectives(program))
        return {"choice": choice, "runs": runs, "gathered": gathered}

    return [measured(*case) for case in cases]


ATTENTION = {
    "v4:2x2x1": [(1000, {})],
    "v5e:2x2": [(2048, {"mesh.tensor": 2}), (512, {"mesh.sequence": 2})],
}


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "cases"), ATTENTION.items())
def test_a_step_with_attention_runs_its_kernel_where_a_device_has_all_positions(topology, cases):
    for case, found in zip(cases, in_a_process("compile_attention", topology, cases), strict=True):
        method, reason = found["choice"]
        if "mesh.sequence" in case[1]:
            assert (method, found["runs"], found["gathered"]) == ("blocked", {}, True)
            assert "split over devices" in reason
            continue
        assert method == "fused"
        # Those of two layers, and the forward ones again in the backward pass.
        assert found["runs"] == {
            "flash_attention": 4, "flash_mha_bwd_dkv": 2, "flash_mha_bwd_dq": 2,
        }, case  # fmt: skip
        assert not found["gathered"], case


if __name__ == "__main__":
    function, *arguments = json.loads(sys.argv[1])
    print(json.dumps(globals()[function](*arguments)))
