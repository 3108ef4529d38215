"""A checkpoint of one mesh generates the same bytes from the same seed on every other mesh."""

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
FOUR = "fsdp=2 tensor=2"
# The mesh that wrote the checkpoint, and the mesh that reads it; '' is one device. First the truth.
QUICK = ((FOUR, ""), (FOUR, FOUR), ("", FOUR))
SLOW = (
    (FOUR, ""), (FOUR, "data=4"), (FOUR, "data=2 tensor=2"), ("data=2", "fsdp=4"),
    ("tensor=2", "data=2 fsdp=2"),
)  # fmt: skip


# ---- in a process with fake devices


def texts(cases):
    """For each case the prompts' texts, in hexadecimal, and into how many shards the parameter
    that is split most is split."""
    config = tiny_run.tiny_config(
        **{
            "data.seq_len": 256, "model.num_layers": 2, "model.hidden_dim": 32,
            "model.memory.head_dim": 8,
        }
    )  # fmt: skip
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
def found(cases):
    return dict(zip(cases, fake_devices.run(__file__, "texts", cases)))


def test_there_is_text():
    texts = found(QUICK)[QUICK[0]]["texts"]
    assert max(len(bytes.fromhex(text)) for text in texts) >= 100
    assert len(set(texts)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("cases", "i"),
    [
        *((QUICK, i) for i in range(1, len(QUICK))),
        *(pytest.param(SLOW, i, marks=pytest.mark.slow) for i in range(1, len(SLOW))),
    ],
)
def test_the_same_bytes_from_every_mesh_to_every_mesh(cases, i):
    truth, *_ = found(cases).values()
    assert found(cases)[cases[i]]["texts"] == truth["texts"]


def test_parameters_are_split():
    shards = {read_on: found(QUICK)[written_on, read_on]["shards"] for written_on, read_on in QUICK}
    assert shards == {"": 1, FOUR: 4}


if __name__ == "__main__":
    fake_devices.main(texts)
