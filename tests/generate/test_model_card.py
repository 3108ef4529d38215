"""The model card: its figures are those of hand-made records, counted here in another way."""

import collections
import json
import types

import numpy as np
import pytest

from spectral_pod.data import byte_store
from spectral_pod.data.byte_store import ByteStore, Record
from spectral_pod.generate import run_records
from spectral_pod.generate.model_card import card
from spectral_pod.generate.restore import restore_for_inference
from spectral_pod.generate.run_records import RunRecords
from spectral_pod.train import goodput
from tests import tiny_run

CLASSES = ["few", "many", "none"]
STEP = 20


def records_of(seed, count):
    rng = np.random.default_rng(seed)
    return [Record(rng.bytes(rng.integers(1, 90)), int(rng.random() < 0.8)) for _ in range(count)]


SPLITS = {"train": records_of(0, 41), "test": records_of(1, 7)}


def write_store(path, splits=SPLITS):
    origin = {"source": "reviews.csv", "files": 3, "bytes": 4567, "sha256": "ab" * 32}
    byte_store.write(
        str(path), splits, classes=CLASSES, provenance={"sources": {"train": origin}, "rows": 48}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose model was trained on the store beside it."""
    folder = tmp_path_factory.mktemp("run")
    write_store(folder / "reviews")
    config = tiny_run.tiny_config(
        **{"data.task": "records", "model.name": "spectral_model", "train.total_steps": 30,
           "data.stores": (str(folder / "reviews"),), "train.global_batch_size": 8}
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny_run, "DIGEST", ByteStore(str(folder / "reviews")).digest)
        tiny_run.write_run(folder / "workdir", config, steps=(STEP,), num_classes=3)
    return folder / "workdir"


@pytest.fixture(scope="module")
def trained(run):
    return restore_for_inference(str(run))._replace(classes=CLASSES)


def read(run, trained):
    return run_records.read(str(run), trained.config, trained.data_digest)


def test_the_sizes_of_the_data_and_where_they_are_from(run, trained):
    text = card(trained, read(run, trained))
    for split, records in SPLITS.items():
        sizes = [len(record.data) for record in records]
        line = f"| reviews | {split} | {len(sizes)} | {sum(sizes):,} | {max(sizes)} |"
        assert line in text.splitlines()
    assert f"- train: reviews.csv, 3 file(s) of 4,567 bytes, sha256 {'ab' * 32}" in text
    assert trained.data_digest in text


def test_classes_by_their_share_and_by_how_many_are_recognised(run, trained):
    rng = np.random.default_rng(2)
    pairs = [(int(t), int(p)) for t, p in rng.integers(0, 2, (50, 2))]
    confusion = [[pairs.count((t, p)) for p in range(3)] for t in range(3)]
    result = {"step": STEP, "eval": {"split": "test", "confusion": confusion}}
    text = card(trained, read(run, trained)._replace(result=result))
    labels = collections.Counter(record.label for record in SPLITS["train"])
    for label, name in enumerate(CLASSES[:2]):
        right = [t == p for t, p in pairs if t == label]
        share, recall = labels[label] / 41, sum(right) / len(right)
        assert f"| {name} | {share:.1%} of 41 | {recall:.1%} of {len(right)} |" in text
    assert "| none | 0.0% of 41 | of none |" in text
    assert "| many |" not in card(trained), "nothing is known of the classes"


@pytest.mark.parametrize("confusion", [None, 3, "abc", [1, 2, 3], [[1] * 3] * 2, [[-1.0] * 3] * 3])
def test_what_is_no_table_of_classes_is_left_out(run, trained, confusion):
    result = {"step": STEP, "eval": {"split": "test", "confusion": confusion}}
    assert "| few | " not in card(trained, RunRecords(result))
    known = card(trained, read(run, trained)._replace(result=result))
    assert " of 41 | unknown |" in known


@pytest.mark.parametrize("change", ["missing", "another", "damaged"])
def test_data_that_are_no_longer_there(run, trained, tmp_path, change):
    config = trained.config.copy_and_resolve_references()
    config.data.stores = (str(tmp_path / "moved"),)
    why = {"missing": "was not there", "another": "is not what", "damaged": "could not be read"}
    if change != "missing":
        write_store(tmp_path / "moved", SPLITS | {"test": records_of(3, 7)})
    if change == "damaged":
        (tmp_path / "moved" / "manifest.json").write_text("{}")
    records = run_records.read(str(run), config, trained.data_digest)
    assert not records.stores
    (line,) = [x for x in card(trained, records).splitlines() if x.startswith("Sources and sizes")]
    assert "unknown" in line
    assert why[change] in line


def test_results_of_the_step_of_each_split(trained):
    metrics = [
        {"step": 10, "validation/loss": 3.0},
        {"step": STEP, "train/loss": 0.5, "validation/loss": 2.5, "validation/accuracy": np.nan},
        {"step": 30, "validation/loss": 2.0},
    ]
    result = {"step": STEP, "eval": {"split": "test", "loss": 2.25, "records": 7}}
    lines = card(trained, RunRecords(result, metrics=metrics)).splitlines()
    assert "| | validation | test |" in lines
    assert "| loss | 2.5 | 2.25 |" in lines
    assert "| records |  | 7 |" in lines
    assert not [line for line in lines if line.startswith("| accuracy")]
    earlier = RunRecords(result | {"step": 30}, metrics=metrics)
    assert "| loss | 2.5 |" in card(trained, earlier).splitlines()


# ---- the footprint


def start(wall_time, step, devices):
    return {"wall_time": wall_time, "step": step, "devices": devices, "processes": 1, "mesh": {},
            "code": "", "jax": ""}  # fmt: skip


@pytest.fixture
def interrupted(monkeypatch):
    """The records of a run that was killed, and went on, by the clock of the trainer's goodput.

    Its processes began at 990 and 1490 and were ready 10 s later; the first wrote at 1020 and 1050
    and died at 1100, the second wrote at 1560.
    """

    def line(step, now, began, last_line, steps):
        phases = dict.fromkeys(goodput.PHASES, 0.0) | {"start": 10.0, "step": steps}
        monkeypatch.setattr(goodput.time, "time", lambda: now)
        counted = goodput.Goodput(last_line, types.SimpleNamespace(started=began, seconds=phases))
        return {"step": step, "wall_time": float(now)} | counted.scalars()

    first = line(1, 1020, 990.0, {}, 5.0)
    second = line(10, 1050, 990.0, {}, 25.0)
    third = line(STEP, 1560, 1490.0, second, 40.0)
    starts = [start(1000.0, 0, "2 TPU v4"), start(1500.0, 10, "4 TPU v4")]
    return RunRecords(starts=starts, metrics=[first, second, third])


def test_time_and_energy_of_a_run_on_changing_devices(trained, interrupted):
    ran = (1050 - 990, 1560 - 1490)  # seconds on 2 and on 4 devices
    spent = interrupted.footprint(STEP)
    assert spent.devices == [(0, "2 TPU v4", 1), (10, "4 TPU v4", 1)]
    assert spent.seconds == pytest.approx(sum(ran))
    assert spent.step_seconds == pytest.approx(25 + 40)
    assert spent.device_seconds == pytest.approx(2 * ran[0] + 4 * ran[1])
    assert spent.restart_seconds == pytest.approx(1490 - 1050)
    text = card(trained, interrupted, watts=500)
    assert "20 steps of 8 rows: 15,360 bytes" in text  # of 96 bytes
    assert "devices from step 0 on: 2 TPU v4, of 1 process" in text
    assert "devices from step 10 on: 4 TPU v4" in text
    assert "energy: 0.0556 kWh" in text  # 400 s x 500 W / 3.6 MJ
    assert "between its 2 starts: 0.122 hours" in text


def test_what_came_after_the_step_is_not_counted(interrupted):
    spent = interrupted.footprint(10)
    assert (spent.seconds, spent.device_seconds, spent.restart_seconds) == (60, 120, 0)
    assert len(spent.devices) == 1


def test_the_unknown_is_called_unknown(run, trained, interrupted):
    assert "energy: unknown, as the power" in card(trained, interrupted)
    for records in (
        RunRecords(),
        interrupted._replace(starts=[]),
        interrupted._replace(metrics=[]),
        interrupted._replace(starts=[start(1000.0, 0, "a TPU")]),
        read(run, trained),
    ):
        assert "devices, time and energy: unknown" in card(trained, records, watts=500)
        assert "kWh" not in card(trained, records, watts=500)


def test_a_run_that_began_with_the_parameters_of_another(trained, interrupted):
    origin = {"workdir": "there", "run": "c0ffee", "step": 700, "differences": []}
    first = interrupted.starts[0] | {"start_from": origin}
    text = card(trained, interrupted._replace(starts=[first, interrupted.starts[1]]))
    assert "step 700 of the run c0ffee, which is not counted here" in text


def test_records_are_read_as_they_were_written(run, trained, interrupted, tmp_path):
    for name in ("starts", "metrics"):
        lines = [json.dumps(line) + "\n" for line in getattr(interrupted, name)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines) + "damaged\n")
    records = read(tmp_path, trained)
    assert records.footprint(STEP) == interrupted.footprint(STEP)
    assert records.result is None
