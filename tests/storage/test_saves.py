"""The checkpointer on gs://. Run as a script, this file is the process that uses it."""

import json
import sys

from orbax.checkpoint._src.serialization import tensorstore_utils

from tests import trainer


def save_and_restore(directory, proxy):
    """Saves, restores and repairs, with and without faults; prints how long it took."""
    import urllib.request

    import jax
    import jax.numpy as jnp
    from etils import epath

    from spectral_pod.train.checkpoint import Checkpointer

    def fail(**faults):
        body = json.dumps(faults).encode()
        request = urllib.request.Request(f"{proxy}/_faults", body, method="PUT")
        urllib.request.urlopen(request).read()

    def make_state(step):
        return {"step": jnp.int32(step), "x": jnp.arange(100_000, dtype=jnp.int32) * step}

    def restored():
        kinds = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
        )
        state = checkpointer.restore(kinds)
        assert jnp.array_equal(state["x"], make_state(int(state["step"]))["x"])
        return int(state["step"])

    def save(step):
        checkpointer.save(step, make_state(step), None)
        checkpointer.wait_until_finished()

    directory = epath.Path(directory)
    run = directory.parent
    with Checkpointer(str(directory), keep_latest=2, keep_best=0) as checkpointer:
        for step in (1, 2, 3):
            save(step)
        assert {path.name for path in directory.iterdir()} == {"2", "3"}
        assert {path.name for path in (run / "seals").iterdir()} == {"2.json", "3.json"}

        fail(outage_s=5, preconditions=True)
        save(4)
        fail(outage_s=1)
        assert restored() == 4

        fail()
        damaged = directory / "4" / "default" / "_METADATA"
        damaged.write_text(damaged.read_text() + " ")
        before = {path.name for path in (directory / "4").iterdir()}
        assert restored() == 3
        assert {path.name for path in directory.iterdir()} == {"3"}
        assert {path.name for path in (run / "quarantine").iterdir()} == {"4-0", "4-0.txt"}
        assert {path.name for path in (run / "quarantine" / "4-0").iterdir()} == before
        assert "_METADATA is altered" in (run / "quarantine" / "4-0.txt").read_text()
        save(4)
        assert restored() == 4


def test_saves_and_restores(proxy, bucket):
    child = [sys.executable, __file__, f"{bucket.url}/run/checkpoints", proxy.url]
    trainer.run(proxy.used_by(child))
    assert "run/seals/4.json" in bucket.names()


def test_orbax_retries_as_the_other_libraries_do():
    from spectral_pod import storage
    from spectral_pod.train import checkpoint  # noqa: F401, it sets the values checked here

    wanted = storage.context()["gcs_request_retries"]
    for use_ocdbt in (False, True):
        context = tensorstore_utils.get_ts_context(use_ocdbt=use_ocdbt)
        assert context["gcs_request_retries"].to_json() == wanted


if __name__ == "__main__":
    save_and_restore(*sys.argv[1:])
