"""The kernels of the delta rule compile for every generation of TPUs, in a rematerialized scan, on
each device's own sequences and heads."""

import importlib.util
import json
import sys

import pytest

from tests import processes, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
]
# Tokens, sequences and heads of a chip, width of a head, gates, clip, chips that share the heads.
CASES = {
    "v4:2x2x1": [(2048, 8, 8, 64, True, 32.0, 1), (512, 16, 4, 64, False, None, 2)],
    "v5e:2x2": [(512, 16, 4, 64, True, 32.0, 1), (2048, 16, 4, 64, False, None, 1)],
    "v5p:2x2x1": [(2048, 16, 4, 64, False, 32.0, 1), (300, 3, 3, 128, True, None, 2)],
    "v6e:2x2": [(2048, 16, 4, 64, True, 32.0, 2), (512, 64, 1, 32, False, 32.0, 1)],
}


def compile_all(topology, cases):
    """For each case the custom calls and collectives of a forward and backward pass, sharded."""
    from spectral_pod.analysis import hardware

    parsed = hardware.parse(topology, 1)
    hardware.prepare(parsed)
    import jax
    import jax.numpy as jnp

    from spectral_pod.analysis import hlo
    from spectral_pod.ops.delta_rule import delta_rule
    from spectral_pod.parallel.mesh import AXES, make_mesh, on_mesh
    from spectral_pod.parallel.sharding import spec

    tokens, state_axes = ("batch", None, "head", None), ("batch", "head", None, None)

    def measured(N, B, H, K, gated, clip, tensor):
        sizes = {"data": 4 // tensor, "tensor": tensor}
        mesh = make_mesh({axis: sizes.get(axis, 1) for axis in AXES}, hardware.devices(parsed))

        def loss(arrays):
            def layer(q_BNHK, _):
                k, v, beta, *log_gate, state = arrays[1:]
                options = {"log_gate_BNH": log_gate[0]} if gated else {}
                found = delta_rule(q_BNHK, k, v, beta, state_BHVK=state, clip=clip, **options)
                return found.o_BNHV, found[1:]

            o, (states, clipped) = jax.lax.scan(jax.checkpoint(layer), arrays[0], length=2)
            return jnp.sum(o) + jnp.sum(states), clipped

        def array(*shape, axes=tokens):
            sharding = jax.sharding.NamedSharding(mesh, spec(*axes[: len(shape)]))
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

        with on_mesh(mesh):
            B, H = B * 4 // tensor, H * tensor
            x, scalar = array(B, N, H, K), array(B, N, H)
            state = array(B, H, K, K, axes=state_axes)
            arrays = [x, x, x, *[scalar] * (2 if gated else 1), state]
            traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(arrays)
            lowered = traced.lower(lowering_platforms=("tpu",))
            program = hlo.Program(lowered.compile().as_text())
        target = r'custom_call_target="(\w+)"'
        instructions = [i for i, _ in program.runs(lambda i: 1.0) if i.opcode == "custom-call"]
        calls = [i for i in instructions if i.attribute(target) == "tpu_custom_call"]
        return {
            "kernels": [
                sum(f"delta_{name}" in program.source(call) for call in calls)
                for name in ("forward", "backward")
            ],
            "collectives": sorted({c.kind for c in hlo.collectives(program)}),
        }

    return [measured(*case) for case in cases]


@pytest.mark.parametrize("topology", CASES)
def test_a_rematerialized_scan_of_kernels_compiles_and_communicates_nothing_but_sums(topology):
    command = [sys.executable, __file__, json.dumps([topology, CASES[topology]])]
    done = processes.run(
        command, cwd=trainer.ROOT, env=trainer.environment(), capture_output=True, text=True,
        timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    for case, found in zip(CASES[topology], json.loads(done.stdout.splitlines()[-1]), strict=True):
        # The forward pass, and in the backward pass the same again.
        assert found["kernels"] == [2, 1], case
        assert found["collectives"] == ["all-reduce"], case


if __name__ == "__main__":
    print(json.dumps(compile_all(*json.loads(sys.argv[1]))))
