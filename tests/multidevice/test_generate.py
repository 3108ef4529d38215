"""A checkpoint of one mesh writes the same bytes, from the same seed, on every other mesh."""

import functools
import math
import tempfile

import jax
import pytest

from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.text import continuations
from tests import tiny_run
from tests.multidevice import fake_devices

PROMPTS = ["a", "A longer prompt, of more than one block of the decoder.", "xyz"]
NUM_BYTES = 130
# The mesh that wrote the checkpoint, and the mesh that reads it; '' is one device.
FOUR = "fsdp=2 tensor=2"
CASES = ((FOUR, ""), (FOUR, FOUR), ("", FOUR), (FOUR, "data=4"), (FOUR, "data=2 tensor=2"))


# ---- in a process with fake devices


def texts(cases):
    """For each case the prompts' texts, in hexadecimal, and into how many shards the parameter
    that is split most is split."""
    config = tiny_run.tiny_config(
        **{"data.seq_len": 256, "model.hidden_dim": 32, "model.memory.head_dim": 8}
    )
    with tempfile.TemporaryDirectory() as home:
        for written_on in {written_on for written_on, _ in cases}:
            mesh = fake_devices.mesh_of(written_on)
            tiny_run.write_run(f"{home}/{written_on}", config, mesh=mesh)
        return [
            continued(f"{home}/{written_on}", fake_devices.mesh_of(read_on))
            for written_on, read_on in cases
        ]


def continued(workdir, mesh):
    trained = restore_for_inference(workdir, mesh=mesh)
    with jax.set_mesh(mesh):
        rows = continuations(
            trained, [prompt.encode() for prompt in PROMPTS], num_bytes=NUM_BYTES, seed=3
        )
        written = [b"".join(pieces).hex() for pieces in zip(*rows)]
    shards = [
        x.size // math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(trained.params)
    ]
    return {"texts": written, "shards": max(shards)}


# ---- under pytest


@functools.cache
def found():
    return dict(zip(CASES, fake_devices.run(__file__, "texts", CASES)))


def test_there_is_text():
    texts = found()[CASES[0]]["texts"]
    assert max(len(bytes.fromhex(text)) for text in texts) >= 100
    assert len(set(texts)) == len(PROMPTS)


@pytest.mark.parametrize("case", CASES[1:])
def test_the_same_bytes_from_every_mesh_to_every_mesh(case):
    assert found()[case]["texts"] == found()[CASES[0]]["texts"]


def test_parameters_are_split():
    shards = {read_on: found()[written_on, read_on]["shards"] for written_on, read_on in CASES}
    assert shards == {"": 1, "data=4": 1, FOUR: 4, "data=2 tensor=2": 2}


if __name__ == "__main__":
    fake_devices.main(texts)
