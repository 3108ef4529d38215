"""Baselines of stores whose best accuracies are known by construction."""

import json
import re
import sys

import numpy as np
import pytest

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import Record
from spectral_pod.data.pipeline import Batches
from tests import trainer
from tests.multidevice import fake_devices

SIZES = {"train": 400, "validation": 100, "test": 203}


def write(path, draw, documents=1):
    """A store of two classes, 3 of 5 records of the second; `draw(rng, label)` gives the bytes."""
    rng = np.random.default_rng(0)
    splits = {
        split: [Record(draw(rng, label), label) for label in (np.arange(size) % 5 < 3).astype(int)]
        for split, size in SIZES.items()
    }
    byte_store.write(str(path), splits, classes=("no", "yes"), provenance={}, documents=documents)
    return path


def letters(rng, p_a, length=200):
    return rng.choice(np.frombuffer(b"ab", np.uint8), length, p=[p_a, 1 - p_a]).tobytes()


def by_histogram(rng, label):
    return letters(rng, 0.5 + 0.1 * (label - 0.5))


def by_order(rng, label):
    """Letters with equal counts, in runs of one or of two."""
    return (b"ab" * 100, b"aabb" * 50)[label]


def by_comparison(rng, label):
    """Both documents are of the same kind or of different kinds; one alone reveals nothing."""
    one = rng.integers(2)
    other = one if label else 1 - one
    return tuple(letters(rng, (0.3, 0.7)[kind]) for kind in (one, other))


def by_the_end(rng, label):
    return b"ab" * 64 + (b"a", b"b")[label] * 20


def baseline(*arguments, code=0):
    """(stdout, stderr) of the tool, which must end with `code`."""
    command = [sys.executable, "-m", "tools.baseline", "--config=tests/trainer.py", *arguments]
    done = trainer.run(command, code)
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


CASES = [
    (by_histogram, 1, {"majority class": (0.6, 0.61), "byte histograms": (0.86, 0.98)}),
    (by_order, 1, {"majority class": (0.6, 0.61), "byte histograms": (0.6, 0.61)}),
    (by_the_end, 1, {"majority class": (0.6, 0.61), "byte histograms": (0.6, 0.61)}),
    (
        by_comparison,
        2,
        {
            "majority class": (0.6, 0.61),
            "byte histograms": (0.45, 0.65),
            "byte histograms and their differences": (0.95, 1.0),
        },
    ),
]


def counted(folder):
    """Histograms of a store of odd records, (counted by the tool, counted byte by byte)."""
    from tools import baseline as tool

    rng = np.random.default_rng(0)
    records = [Record((rng.bytes(rng.integers(0, 90)), b"\0" * i), i % 2) for i in range(13)]
    byte_store.write(folder, {"test": records}, classes="ab", provenance={}, documents=2)
    split = byte_store.ByteStore(folder).split("test")
    source = Batches(split, batch_size=5, seq_len=60, documents=2, truncate=True)
    held = tool.histograms(source, 2, "test")
    assert held.labels.tolist() == [record.label for record in records]
    read = [[document[:60] for document in record.data] for record in records]
    expected = [[[d.count(b) / max(1, len(d)) for b in range(256)] for d in pair] for pair in read]
    return held.frequencies.tolist(), expected


def answers(folder):
    """Of every case the lines of the table, and `counted`; in a process of its own, as two tools
    may have flags of the same name."""
    from spectral_pod.train.sources import open_sources
    from tools import baseline as tool

    found = []
    for draw, documents, _ in CASES:
        store = write(f"{folder}/{draw.__name__}", draw, documents)
        config = trainer.get_config()
        config.data.stores = (store,)
        config.data.documents = documents
        config.data.seq_len = 128 if draw is by_the_end else 256
        config.train.eval_batch_size = 64
        lines, records = tool.baselines(open_sources(config))
        assert records == SIZES
        found.append({line.name: line.test for line in lines})
    return found, counted(f"{folder}/odd")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return fake_devices.run(__file__, "answers", str(tmp_path_factory.mktemp("stores")))


def test_every_document_is_counted(found):
    np.testing.assert_allclose(*found[1], rtol=1e-6)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: CASES[i][0].__name__)
def test_what_each_line_earns(found, case):
    lines, bounds = found[0][case], CASES[case][2]
    assert lines.keys() == bounds.keys()
    for name, (low, high) in bounds.items():
        assert low <= lines[name] <= high, name


def test_the_tool(tmp_path):
    store = write(tmp_path / "store", by_histogram)
    stdout, stderr = baseline(
        f"--config.data.stores=('{store}',)", f"--json={tmp_path / 'figures.json'}"
    )
    head, columns, *lines = stdout.splitlines()
    assert head == "listops: 2 classes, records 400 train, 100 validation, 203 test"
    assert columns.split() == ["test"]
    printed = {re.split("  +", line)[0]: float(re.search(r"([\d.]+)%", line)[1]) for line in lines}
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["records"] == SIZES
    assert printed == {b["name"]: round(100 * b["test"], 2) for b in figures["baselines"]}
    assert stderr.count("penalty") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.task=lm", "--config.model.name=spectral_gpt"], "objective is NextByte"),
        (["--config.data.tusk=lm"], "no field 'tusk'"),
    ],
)
def test_one_message(arguments, message):
    stdout, stderr = baseline(*arguments, code=2)
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert stdout == ""


if __name__ == "__main__":
    fake_devices.main(answers)
