"""An example is a pure function of (seed, split, index)."""

import jax
import numpy as np
import pytest

from spectral_pod.data import tasks
from spectral_pod.data.drawn import SPLITS, Drawn
from spectral_pod.data.pipeline import load
from spectral_pod.errors import ConfigError
from spectral_pod.parallel.mesh import AXES, make_mesh
from spectral_pod.parallel.sharding import batch_sharding
from spectral_pod.shapes import PAD

DRAWN = [name for name, task in tasks.TASKS.items() if issubclass(task, tasks.DrawnTask)]


def draw_numbers(rng):
    """Up to 7 large random numbers, of which every second one is scored."""
    tokens = rng.integers(1 << 30, size=1 + rng.integers(7), dtype=np.int32)
    return tokens, np.where(np.arange(len(tokens)) % 2, -1, tokens)


def make(split="train", draw=draw_numbers, **changes):
    arguments = {"max_length": 7, "batch_size": 4, "seq_len": 8, "seed": 0, "num_records": 10}
    return Drawn(draw, split, **(arguments | changes))


def examples(source, steps):
    """The tokens of each row, as tuples."""
    batches = [source.rows(step, np.arange(source.batch_size)) for step in range(steps)]
    return [tuple(row[row != PAD]) for batch in batches for row in batch["tokens"]]


def test_rows_hold_examples_and_then_padding():
    source = make()
    batch = source.rows(1, np.arange(4))
    for row in range(4):
        tokens, labels = source.draw(4 + row)
        padding = 8 - len(tokens)
        assert list(batch["tokens"][row]) == [*tokens, *[PAD] * padding]
        assert list(batch["valid"][row]) == [*(labels >= 0), *[False] * padding]
        assert list(batch["labels"][row]) == [*np.maximum(labels, 0), *[0] * padding]
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
        "tokens": (np.int32, (4, 8)),
        "labels": (np.int32, (4, 8)),
        "valid": (bool, (4, 8)),
    }


def test_evaluation_has_every_example_once_and_then_padding():
    source = make("test", num_records=10)
    assert (source.num_records, source.steps_per_epoch) == (10, 3)
    assert examples(source, 3) == [tuple(source.draw(i)[0]) for i in range(10)] + [()] * 2
    assert not source.rows(2, np.arange(2, 4))["valid"].any()


def test_training_repeats_its_examples_or_never_ends():
    finite, endless = make(repeat=True), make(repeat=True, num_records=0)
    first = examples(endless, 10)
    assert len(set(first)) == 40
    assert examples(finite, 10) == first[:10] * 4
    far = endless.rows(10**15, np.arange(4))["tokens"]
    assert tuple(far[0][far[0] != PAD]) not in first


def test_splits_and_seeds_are_streams_of_their_own():
    streams = [
        examples(make(split, seed=seed, num_records=40), 10)
        for split in SPLITS
        for seed in (0, 1, 2, 1 << 32, 1 << 33)
    ]
    assert len({example for stream in streams for example in stream}) == len(streams) * 40


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("task", DRAWN)
def test_processes_draw_their_own_rows_of_the_same_batch(task, num_processes):
    task = tasks.make(task, {})
    options = {"seed": 3, "batch_size": 8, "seq_len": 1024, "num_records": 0, "repeat": True}
    options |= {"draw": task.draw, "max_length": task.max_length}
    for step in (5, 0, 2):
        expected = make(**options).rows(step, np.arange(8))
        parts = [make(**options).rows(step, rows) for rows in np.split(np.arange(8), num_processes)]
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
        assert expected["valid"].any(axis=1).all()


def test_loading_to_global_arrays():
    source, mesh = make(), make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    steps = load(source, batch_sharding(mesh), 0, 3, threads=2, prefetch=2)
    for step, batch in zip(range(3), steps, strict=True):
        for name, values in source.rows(step, np.arange(4)).items():
            np.testing.assert_array_equal(batch[name], values)


def test_impossible_requests_name_the_field():
    with pytest.raises(ConfigError, match=r"config\.data\.seq_len is 8; .* up to 9 tokens"):
        make(max_length=9)
    with pytest.raises(ConfigError, match=r"splits .*'test'\], not 'tset'"):
        make("tset")
    with pytest.raises(ConfigError, match="'test' would hold no examples"):
        make("test", num_records=0)
