"""What surrounds the kernels in a layer writes what they read, as compiled for TPUs."""

import importlib.util
import json
import sys

import pytest

from tests import processes, trainer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
BATCH, LENGTH, WIDTH = 8, 512, 128  # of a chip
TOPOLOGIES = [
    "v5e:2x2",
    *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5p:2x2x1", "v6e:2x2")),
]


def compile_layer(topology):
    """Kernels of a Hyena layer's forward and backward pass, and copies as large as activations."""
    from spectral_pod.analysis import hardware

    parsed = hardware.parse(topology, 1)
    hardware.prepare(parsed)
    import jax
    import jax.numpy as jnp

    from spectral_pod.analysis import hlo
    from spectral_pod.layers.hyena import HyenaLayer
    from spectral_pod.parallel.mesh import AXES, make_mesh, on_mesh
    from spectral_pod.parallel.sharding import spec
    from tests.models.drawn import drawn

    sizes = {axis: 1 for axis in AXES} | {"data": parsed.num_chips}
    mesh = make_mesh(sizes, hardware.devices(parsed))
    layer = HyenaLayer(WIDTH, max_positions=LENGTH, dtype=jnp.bfloat16)

    def array(shape, dtype, *axes):
        sharding = jax.sharding.NamedSharding(mesh, spec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = BATCH * parsed.num_chips
    x = array((rows, LENGTH, WIDTH), jnp.bfloat16, "batch", None, None)
    mask = array((rows, LENGTH), bool, "batch", None)
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x, mask)["params"]
    params = jax.tree.map(lambda p: array(p.shape, p.dtype), drawn(boxed))

    def both(params, x, mask, dy):
        y, pullback = jax.vjp(lambda p, x: layer.apply({"params": p}, x, mask), params, x)
        return y, pullback(dy)

    with on_mesh(mesh):
        lowered = jax.jit(both).trace(params, x, mask, x).lower(lowering_platforms=("tpu",))
        program = hlo.Program(lowered.compile().as_text())
    instructions = [i for i, _ in program.runs(lambda i: 1.0)]
    calls = [i.name for i in instructions if i.opcode == "custom-call"]
    copies = [
        f"{i.opcode} of {i.arrays[0]} from {program.source(i)}"
        for i in instructions
        if i.opcode in ("copy", "transpose")
        and sum(a.bytes for a in i.arrays) >= BATCH * LENGTH * WIDTH
    ]
    names = "toeplitz_forward", "toeplitz_backward", "short_conv_forward", "short_conv_backward"
    return {"copies": copies} | {
        name: sum(call.startswith(name) for call in calls) for name in names
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_no_activation_is_copied(topology):
    command = [sys.executable, __file__, json.dumps(topology)]
    done = processes.run(
        command, cwd=trainer.ROOT, env=trainer.environment(), capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "copies": [], "toeplitz_forward": 1, "toeplitz_backward": 1, "short_conv_forward": 3,
        "short_conv_backward": 3,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(compile_layer(json.loads(sys.argv[1]))))
