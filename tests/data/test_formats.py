"""Files of all formats are read back byte for byte, from folders, globs and storage."""

import csv
import gzip
import io
import json
import pathlib
import tracemalloc

import fsspec
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from spectral_pod.data import formats
from spectral_pod.errors import DataError
from tests.data.files import COMPRESS, SHARED, reader


@pytest.fixture
def read(tmp_path):
    return reader(tmp_path)


def as_bytes(text):
    return text.encode("utf-8", "surrogateescape")


any_text = st.binary(max_size=12).map(lambda data: data.decode("utf-8", "surrogateescape"))


# ---- round trips of every format


@hypothesis.given(
    st.lists(st.tuples(any_text, st.integers(), st.floats(allow_nan=False)), max_size=5),
    st.sampled_from(sorted(COMPRESS)),
    st.booleans(),
)
@hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_json_lines(read, values, compression, ascii):
    """Invalid UTF-8 survives, be it raw or escaped as Python does, \\udc80."""
    lines = [json.dumps(dict(zip("tif", value)), ensure_ascii=ascii) for value in values]
    content = COMPRESS[compression](as_bytes("\n".join(lines)))
    rows = read(f"x.jsonl{compression}", content)
    expected = [{"t": as_bytes(text), "i": i, "f": f} for text, i, f in values]
    assert [fields for _, fields in rows] == expected
    assert [place for place, _ in rows] == [
        f"x.jsonl{compression}:{i + 1}" for i in range(len(rows))
    ]


@hypothesis.given(
    st.lists(st.tuples(any_text, any_text), max_size=5), st.sampled_from(["\n", "\r\n"])
)
@hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_csv(read, values, newline):
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerow(["a", "b,\n"])
    starts = []
    for value in values:
        starts.append(stream.getvalue().count("\n") + 1)
        writer.writerow(value)
    rows = read("x.csv", as_bytes(stream.getvalue()))
    assert rows == [
        (f"x.csv:{start}", {"a": as_bytes(a), "b,\n": as_bytes(b)})
        for start, (a, b) in zip(starts, values)
    ]


@hypothesis.given(
    st.lists(
        st.tuples(*[st.binary(max_size=9)] * 2).map(
            lambda pair: tuple(b"%s" % part.translate(None, b"\t\r\n") for part in pair)
        ),
        max_size=5,
    )
)
@hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_tsv_has_no_quotes(read, values):
    content = b"a\tb\n" + b"".join(b"%s\t%s\n" % pair for pair in values)
    rows = read("x.tsv", content)
    assert [fields for _, fields in rows] == [{"a": a, "b": b} for a, b in values]


@hypothesis.given(st.lists(st.binary(max_size=9).map(lambda b: b.translate(None, b"\r\n"))))
@hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_text(read, lines):
    """Empty lines are records as well."""
    rows = read("x.txt", b"".join(line + b"\n" for line in lines), format="text")
    assert [fields["text"] for _, fields in rows] == lines


def test_parquet(tmp_path, read):
    n = 1000
    texts = [b"\xff\x00%d" % i for i in range(n)]
    table = pa.table(
        {
            "text": pa.array(texts, pa.binary()).view(
                pa.string()
            ),  # invalid UTF-8, as other writers produce
            "kind": pa.array([f"k{i % 3}" for i in range(n)]).dictionary_encode(),
            "label": pa.array([None if i == 7 else i for i in range(n)], pa.int32()),
            "score": [i / 2 for i in range(n)],
            "flag": [i % 2 == 0 for i in range(n)],
            "pixels": pa.array([[i % 256, 1] for i in range(n)], pa.list_(pa.uint8())),
            "time": pa.array(range(n), pa.timestamp("ns")),
            "nested": [{"bytes": b"x"}] * n,
        }
    )
    pa.parquet.write_table(table, tmp_path / "y.parquet", row_group_size=300)
    rows = read("x.parquet", (tmp_path / "y.parquet").read_bytes())
    assert [place for place, _ in rows] == [f"x.parquet[{i}]" for i in range(n)]
    for i in (0, 7, 299, 300, 999):
        fields = dict(rows[i][1])
        pixels = fields.pop("pixels")
        assert pixels.dtype == np.uint8
        assert pixels.tolist() == [i % 256, 1]
        assert fields.pop("time").endswith(b".%09d" % i)
        assert fields == {
            "text": texts[i],
            "kind": b"k%d" % (i % 3),
            "label": None if i == 7 else i,
            "score": i / 2,
            "flag": i % 2 == 0,
            "nested": {"bytes": b"x"},
        }


def test_npz(read):
    arrays = {
        "pixels": np.arange(24, dtype=np.uint8).reshape(3, 2, 4),
        "label": np.array([2, 0, 1], np.int8),
        "name": np.array(["a", "é", ""]),
        "raw": np.array([b"\xff", b"", b"b"]),
    }
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, **arrays)
        rows = read("x.npz", stream.getvalue())
        assert [place for place, _ in rows] == ["x.npz[0]", "x.npz[1]", "x.npz[2]"]
        for i, (_, fields) in enumerate(rows):
            np.testing.assert_array_equal(fields["pixels"], arrays["pixels"][i])
            assert (fields["label"], type(fields["label"])) == ([2, 0, 1][i], int)
            assert fields["name"] == ["a", "é", ""][i].encode()
            assert fields["raw"] == arrays["raw"][i]


def test_fasta(read):
    content = b">a first one\r\nACGT\r\nAC\r\n\r\n>b\n>c\nA C\nG"
    rows = read("x.fa", content)
    assert [place for place, _ in rows] == ["x.fa:1", "x.fa:5", "x.fa:6"]
    assert [{k: fields[k] for k in ("id", "description", "sequence")} for _, fields in rows] == [
        {"id": b"a", "description": b"first one", "sequence": b"ACGTAC"},
        {"id": b"b", "description": b"", "sequence": b""},
        {"id": b"c", "description": b"", "sequence": b"ACG"},
    ]
    assert all(fields["name"] == b"x" for _, fields in rows)
    assert read("x.fa", b"\nACGT\n" + content)[0] == (
        "x.fa:2",
        "no FASTA: a line before the first that starts '>'",
    )


def test_fastq_goes_on_where_the_next_record_starts(read):
    good = b"@r%d x y\nACGT\n+\n@@+!\n"
    empty = b"@e\n\n+\n\n"
    content = good % 0 + empty + b"\n" + good[:-2] % 1 + b"\n" + good % 2 + good[:-6] % 3
    rows = read("x.fq", content)
    assert [place for place, _ in rows] == [f"x.fq:{n}" for n in (1, 5, 10, 14, 18)]
    reason = "no FASTQ: not '@', a sequence, '+', qualities as many"
    assert [rows[i][1] for i in (2, 4)] == [reason] * 2
    assert [(rows[i][1]["id"], rows[i][1]["sequence"]) for i in (0, 1, 3)] == [
        (b"r0", b"ACGT"),
        (b"e", b""),
        (b"r2", b"ACGT"),
    ]
    assert rows[0][1]["description"] == b"x y"
    assert rows[0][1]["quality"] == b"@@+!"


def test_whole_files_in_folders_of_classes(tmp_path):
    contents = {"neg/b.bin": b"\x00\xff", "neg/a.tar.gz": b"not gzip at all", "pos/c": b""}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = [
        row for file in formats.files(str(tmp_path)) for row in formats.rows(file, format="whole")
    ]
    assert [(row.fields["folder"], row.fields["name"], row.fields["bytes"]) for row in found] == [
        (b"neg", b"a.tar", b"not gzip at all"),
        (b"neg", b"b.bin", b"\x00\xff"),
        (b"pos", b"c", b""),
    ]


# ---- files


def test_files_of_folders_and_globs(tmp_path, monkeypatch):
    for name in ("b.csv", "a/z.csv", "a/b/c.txt", ".hidden", ".git/x", "a/.x", "odd[1].csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())

    def names(source):
        return [pathlib.Path(p).relative_to(tmp_path).as_posix() for p in formats.files(source)]

    assert names(str(tmp_path)) == ["a/b/c.txt", "a/z.csv", "b.csv", "odd[1].csv"]
    assert names(f"{tmp_path}/*.csv") == ["b.csv", "odd[1].csv"]
    assert names(f"{tmp_path}/**/*.csv") == ["a/z.csv", "b.csv", "odd[1].csv"]
    assert names(f"{tmp_path}/odd[1].csv") == ["odd[1].csv"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/b.csv") == ["b.csv"]
    monkeypatch.chdir(tmp_path / "a")
    assert names("z.csv") == ["a/z.csv"]
    (tmp_path / "empty").mkdir()
    for source in ("missing", "*.gone", str(tmp_path / "empty")):
        with pytest.raises(DataError, match="there is no such file"):
            formats.files(source)
    with pytest.raises(DataError, match=r"missing.*cannot be opened"):
        list(formats.rows(f"{tmp_path}/missing.csv"))
    assert formats.size_and_time(str(tmp_path / "b.csv"))[0] == 5


def test_gs_goes_through_its_file_system(tmp_path, monkeypatch):
    """Only fsspec's file system differs for `gs://`; a folder stands in for the storage."""
    cloud, real = DirFileSystem(str(tmp_path)), fsspec.filesystem
    monkeypatch.setattr(fsspec, "filesystem", lambda name: cloud if name == "gs" else real(name))
    (tmp_path / "bucket/set/a").mkdir(parents=True)
    (tmp_path / "bucket/set/b.jsonl.gz").write_bytes(gzip.compress(b'{"t": "x"}\n{"t": "y"}'))
    (tmp_path / "bucket/set/a/a.txt").write_bytes(b"1\n2\n")
    for name in (".hidden", "_SUCCESS"):
        (tmp_path / "bucket/set" / name).touch()
    files = ["gs://bucket/set/a/a.txt", "gs://bucket/set/b.jsonl.gz"]
    assert formats.files("gs://bucket/set") == formats.files("gs://bucket/set/") == files
    assert formats.files("gs://bucket/*/b.*") == formats.files(files[1]) == files[1:]
    assert formats.files("gs://bucket/set/*") == files[1:]
    assert [(row.place, row.fields["t"]) for row in formats.rows(files[1])] == [
        (f"{files[1]}:1", b"x"),
        (f"{files[1]}:2", b"y"),
    ]
    assert [row.fields["text"] for row in formats.rows(files[0])] == [b"1", b"2"]
    assert formats.size_and_time(files[0])[0] == 4
    with pytest.raises(DataError, match="gs://bucket/gone"):
        formats.files("gs://bucket/gone")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_memory_holds_a_record(tmp_path, compression):
    """Reading 16 MB of lines takes less than 5 MB, with any compression."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({"t": rng.bytes(8_000).hex()}).encode() + b"\n" for _ in range(1000)]
    path = tmp_path / f"x.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](b"".join(lines)))
    del lines
    tracemalloc.start()
    try:
        assert sum(len(row.fields["t"]) for row in formats.rows(str(path))) == 16e6
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is missing")
def test_real_files():
    reviews = list(formats.rows(str(SHARED / "imdb_test.jsonl.xz")))
    assert len(reviews) == 12_499
    assert all(type(r.fields["text"]) is bytes and r.fields["label"] in (0, 1) for r in reviews)
    (genome,) = formats.rows(str(SHARED / "lambda_virus.fa"))
    assert len(genome.fields["sequence"]) == 48_502
