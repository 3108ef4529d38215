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
            chosen = [resolve("auto", *shape, dtype) for shape in shapes]
            program = hlo.Program(lowered.compile().as_text())
        calls = [i for i, _ in program.runs(lambda i: 1.0) if i.opcode == "custom-call"]
        return {
            "chosen": chosen,
            "kernels": sum("toeplitz" in program.source(call) for call in calls),
            "collectives": sorted({c.kind for c in hlo.collectives(program)}),
        }

    return [measured(*case) for case in cases]


@pytest.mark.parametrize(
    ("topology", "cases"),
    [*QUICK.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())],
)
def test_a_sharded_pass_has_two_kernels_and_moves_only_what_it_must(topology, cases):
    command = [sys.executable, __file__, json.dumps([topology, cases])]
    done = processes.run(
        command, cwd=trainer.ROOT, env=trainer.environment(), capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    for case, found in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert found["kernels"] == 2, case
        # Of short sequences another method is faster; long ones do not fit on the chip.
        fits = "toeplitz" if case[0] >= 512 else "matmul"
        assert found["chosen"] == [fits, "matmul"], case
        exchanged = ["all-to-all"] if case[-1] > 1 else []
        assert found["collectives"] == ["all-reduce", *exchanged], case


if __name__ == "__main__":
    print(json.dumps(compile_all(*json.loads(sys.argv[1]))))
