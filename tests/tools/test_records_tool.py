"""The records tool, as a user calls it."""

import json
import pathlib
import subprocess
import sys

import pytest

from spectral_pod.data.byte_store import ByteStore
from tools import records

REVIEWS = [
    {"text": f"review {i} is {'good' if i % 3 else 'bad'}\x00", "stars": str(i % 3 > 0)}
    for i in range(90)
]


@pytest.fixture
def files(tmp_path):
    for split, part in (("train", REVIEWS), ("test", REVIEWS[:4])):
        lines = [json.dumps(review) + "\n" for review in part]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    return tmp_path


def write(files, *more):
    return records.main(
        ["write", "--task=records", f"--out={files / 'store'}", f"--train={files}/train.jsonl",
         f"--test={files}/test.jsonl", "--label=stars", *more]
    )  # fmt: skip


def test_write_describe_verify_head(files, capsys):
    assert write(files, "--held_out=0.2", "--classes=('False', 'True')") == 0
    store = str(files / "store")
    out = capsys.readouterr().out
    assert "2 classes, 1 document(s) a record" in out
    splits = {name: ByteStore(store).split(name) for name in ("train", "validation", "test")}
    assert len(splits["train"]) + len(splits["validation"]) == 90
    assert len(splits["test"]) == 4
    assert records.main(["verify", store]) == 0
    assert "is sound: 94 records" in capsys.readouterr().out
    assert records.main(["head", store, "--split=test", "--count=2"]) == 0
    shown = capsys.readouterr().out
    assert "0: class False\n   16 bytes: review 0 is bad\\x00" in shown
    assert records.main(["describe", store, "--duplicates"]) == 0
    report = json.loads(capsys.readouterr().out.rpartition("\n{\n")[2].join(["{", ""]))
    assert report["duplicates"]["test"]["equal"] >= 1


def test_mistakes_are_told_in_a_line(files, capsys):
    assert write(files) == 0
    assert write(files) == 2
    assert "holds a finished store" in capsys.readouterr().err
    assert records.main(["verify", str(files / "none")]) == 2
    assert "holds no finished byte store" in capsys.readouterr().err
    bad = ["write", "--task=records", f"--out={files / 'b'}", f"--train={files}/train.jsonl"]
    assert records.main([*bad, "--held_out=half"]) == 2
    assert "held_out is 'half'; it must be a number" in capsys.readouterr().err
    assert records.main(bad) == 2  # there is no field 'label'
    assert "train.jsonl:1" in capsys.readouterr().err


def test_a_flipped_byte_is_found(files, capsys):
    assert write(files) == 0
    file = next((files / "store" / "train").glob("*/bytes/c/*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    assert records.main(["verify", str(files / "store")]) == 2
    assert "/bytes" in capsys.readouterr().err


def test_help_lists_the_options_of_the_task():
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "tools.records", "write", "--task=listops", "--help"]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "--encoding" in out
    assert "--held_out" not in out
