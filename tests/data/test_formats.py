"""Files of all formats are read back byte for byte, and errors name what is wrong."""

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import pathlib
import tracemalloc

import fsspec
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from fsspec.implementations.dirfs import DirFileSystem

from spectral_pod.data import formats, text
from spectral_pod.data.formats import Fault, Row
from spectral_pod.errors import DataError

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": functools.partial(lzma.compress, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
}
compressions = pytest.mark.parametrize("compression", [c for c in COMPRESS if c])


@pytest.fixture
def read(tmp_path):
    """Writes a file and reads it: [(place without the folder, fields or reason)]."""

    def read_once(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content)
        found = list(formats.rows(str(path), **options))
        assert all(
            isinstance(row, Row | Fault) and row.place.startswith(f"{path}") for row in found
        )
        return [(row.place.removeprefix(f"{tmp_path}/"), row[1]) for row in found]

    return read_once


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


# ---- unusual files


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n", b"\n \t\n"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_ends_of_lines_and_files(read, end, newline, bom):
    tail = end if end != b"\n \t\n" else b"\n"
    table = {"t": b"a", "n": b"1"}
    for name, lines in {"x.csv": (b"t,n", b"a,1"), "x.tsv": (b"t\tn", b"a\t1")}.items():
        assert read(name, bom + newline.join(lines) + tail) == [(f"{name}:2", table)]
    lines = b'{"t": "a"}', b'{"t": "b"}'
    assert [f for _, f in read("x.jsonl", bom + newline.join(lines) + end)] == [
        {"t": b"a"},
        {"t": b"b"},
    ]
    assert [f["text"] for _, f in read("x.txt", bom + b"a" + newline + b"b" + tail)][:2] == [
        b"a",
        b"b",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "fasta", "fastq", "txt"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_an_empty_file_has_no_records(read, suffix, compression):
    for content in (b"", b"\xef\xbb\xbf"):
        assert read(f"x.{suffix}{compression}", COMPRESS[compression](content)) == []


def test_empty_records_are_records(read):
    assert read("x.jsonl", b'{}\n{"t": ""}') == [("x.jsonl:1", {}), ("x.jsonl:2", {"t": b""})]
    assert read("x.csv", b't\n""\n') == [("x.csv:2", {"t": b""})]
    assert read("x.tsv", b"t\tn\n\t\n") == [("x.tsv:2", {"t": b"", "n": b""})]


def test_zero_bytes_and_bad_utf8_stay(read):
    odd = b"\x00a\x80\xff\xed\xa0\xbd"
    assert read("x.jsonl", b'{"t": "%s"}' % odd)[0][1] == {"t": odd}
    for name, content in {"x.csv": b"t,u\n%s,1", "x.tsv": b"t\tu\n%s\t1"}.items():
        assert read(name, content % odd)[0][1] == {"t": odd, "u": b"1"}
    assert read("x.txt", odd)[0][1]["text"] == odd
    assert read("x.jsonl", rb'{"t": "\u0000\ud83d\ude00\ud83d\u00e9"}')[0][1] == {
        "t": b"\x00" + "😀".encode() + b"\xed\xa0\xbd" + "é".encode()
    }


def test_quotes_and_newlines_in_fields(read):
    content = b'a,b\n"x\n""y""\r\n,",1\nz"w,2\n"\n\n",3\n'
    assert read("x.csv", content) == [
        ("x.csv:2", {"a": b'x\n"y"\r\n,', "b": b"1"}),
        ("x.csv:5", {"a": b'z"w', "b": b"2"}),
        ("x.csv:6", {"a": b"\n\n", "b": b"3"}),
    ]


def test_columns_may_be_named(read):
    rows = read("x.tsv", b'1\t"x\n2\ty\n', columns=("label", "text"))
    assert rows == [
        ("x.tsv:1", {"label": b"1", "text": b'"x'}),
        ("x.tsv:2", {"label": b"2", "text": b"y"}),
    ]
    with pytest.raises(DataError, match=r"csv and tsv, not for jsonl"):
        read("x.jsonl", b"{}", columns=("a",))


def test_a_field_may_be_long(read):
    text = b"x" * 300_000  # more than the csv module allows by default
    assert read("x.csv", b"t,u\n%s,1" % text)[0][1]["t"] == text


def test_a_line_of_100_mb(read):
    text = b"abcdefghi " * 10_000_000
    ((_, fields),) = read("x.jsonl", b'{"text": "%s"}\n' % text)
    assert fields["text"] == text


# ---- unreadable files


def test_faults_are_named_and_what_follows_is_read(read):
    content = b'{"t": 1}\n{"t": \n[1]\n{"t": 1, "t": 2}\nnull\n\n' + b"[" * 10**5 + b'\n{"t": 2}'
    rows = read("x.jsonl", content)
    assert [place for place, _ in rows] == [f"x.jsonl:{n}" for n in (1, 2, 3, 4, 5, 7, 8)]
    reasons = [reason for _, reason in rows[1:-1]]
    for reason, start in zip(
        reasons,
        ("invalid JSON: Expecting", "no JSON object: a list", "invalid JSON: a name occurs twice",
         "no JSON object: a NoneType", "invalid JSON: "),
    ):  # fmt: skip
        assert reason.startswith(start)
    assert rows[-1] == ("x.jsonl:8", {"t": 2})


@pytest.mark.parametrize(("suffix", "sep"), [("csv", b","), ("tsv", b"\t")])
def test_rows_with_wrong_columns(read, suffix, sep):
    lines = [b"ab", b"123", b"12", b"1", b"34"]
    rows = read(f"x.{suffix}", b"\n".join(sep.join(bytes([c]) for c in line) for line in lines))
    good = [("3", {"a": b"1", "b": b"2"}), ("5", {"a": b"3", "b": b"4"})]
    assert rows == [
        (f"x.{suffix}:2", "wrong columns: 3, not 2"),
        (f"x.{suffix}:{good[0][0]}", good[0][1]),
        (f"x.{suffix}:4", "wrong columns: 1, not 2"),
        (f"x.{suffix}:{good[1][0]}", good[1][1]),
    ]


def test_malformed_quotes(read):
    rows = read("x.csv", b'a,b\n"x"y,1\nz,2\n"never,3\nended,4\n')
    assert [place for place, _ in rows] == [f"x.csv:{n}" for n in range(2, 6)]
    assert rows[0][1].startswith("malformed row: ',' expected")
    assert rows[1][1] == {"a": b"z", "b": b"2"}
    assert rows[2][1] == "malformed row: unexpected end of data"
    assert rows[3][1] == {"a": b"ended", "b": b"4"}


@pytest.mark.parametrize("compression", COMPRESS)
def test_lines_have_a_limit(read, monkeypatch, compression):
    monkeypatch.setattr(formats, "MAX_BYTES", 1000)
    monkeypatch.setattr(text, "_BLOCK_BYTES", 64)

    def check(name, lines, bad, reason):
        content = COMPRESS[compression](b"\n".join(lines))
        rows = read(name + compression, content)
        faults = [(place, why) for place, why in rows if isinstance(why, str)]
        assert faults == [(f"{name}{compression}:{n}", reason) for n in bad]
        assert len(rows) - len(faults) == 2

    long, reason = b"x" * 5000, "too long: more than 1,000 bytes"
    check("x.jsonl", [b"{}", b'{"t": "%s"}' % long, b"{}", long], [2, 4], reason)
    check("x.txt", [long, b"a", long, b"x" * 999], [1, 3], reason)
    check("x.fa", [b">a", b"A", b">b", long, b">c", b"x" * 600, b"x" * 600, b">d"], [3, 5], reason)
    reason = "malformed row: a line of more than 1,000 bytes"
    check("x.csv", [b"t,u", b"1,2", b"1,%s" % long, b'"1\n",2', b"%s,2" % long], [3, 6], reason)
    reason = "malformed row: field larger than field limit (1000)"
    many = b"\n".join([b"x" * 600] * 3)
    content = b't,u\n1,2\n"%s",3\n1,2' % many
    assert read("x.csv", content)[1] == ("x.csv:3", reason)
    (tmp,) = read("whole", long, format="whole")
    assert tmp == ("whole", "too long: more than 1,000 bytes")


@compressions
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_truncated_compression_is_damage(read, compression, suffix):
    rng = np.random.default_rng(0)
    lines = [rng.bytes(30).hex() for _ in range(6000)]
    if suffix == "jsonl":
        lines = [json.dumps({"t": line}) for line in lines]
    content = COMPRESS[compression]("\n".join(lines).encode())
    found = 0
    for cut in (0, 1, 5, len(content) // 2, len(content) - 1):
        name = f"{cut}.{suffix}{compression}"
        with pytest.raises(DataError, match=rf"{name} is damaged or cut short after") as error:
            read(name, content[:cut])
        found += f"{name}:" in str(error.value)
    assert found  # the last good record is named if there is one
    with pytest.raises(DataError, match="is damaged"):
        read(f"x.{suffix}{compression}", content + b"more")
    assert len(read(f"y.{suffix}{compression}", content)) >= 5999


@compressions
def test_compressed_files_may_follow_each_other(read, compression):
    compress = COMPRESS[compression]
    content = compress(b"a\nb") + compress(b"") + compress(b"c\nd\n") + bytes(8)
    rows = read(f"x.txt{compression}", content)
    assert [fields["text"] for _, fields in rows] == [b"a", b"bc", b"d"]


def test_zstandard_with_long_windows_and_skippable_frames(read):
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = stream.compress(b"a\n" * 1000) + stream.flush()
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    assert len(read("x.txt.zst", skippable + content + skippable)) == 1000


@pytest.mark.parametrize("cut", [10, -10])
@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_damaged_columns(tmp_path, read, suffix, cut):
    stream = io.BytesIO()
    if suffix == "npz":
        np.savez(stream, a=np.arange(1000))
    else:
        pa.parquet.write_table(pa.table({"a": range(1000)}), stream)
    assert len(read(f"x.{suffix}", stream.getvalue())) == 1000
    with pytest.raises(DataError, match=rf"y\.{suffix}"):
        read(f"y.{suffix}", stream.getvalue()[:cut])


def test_names_that_say_nothing(read):
    with pytest.raises(DataError, match=r"x\.doc.* suffix '\.doc' .*\.jsonl.*\.zst.*parquet"):
        read("x.doc", b"")
    with pytest.raises(DataError, match=r"suffix '\.json'"):
        read("x.json.gz", b"")
    with pytest.raises(DataError, match=r"format 'xml' is unknown; there are auto, jsonl"):
        read("x.xml", b"", format="xml")
    with pytest.raises(DataError, match="parquet has compression of its own"):
        read("x.parquet.gz", b"")
    assert read("X.JSONL", b"{}") == read("X.JSONL", b"{}", format="jsonl") == [("X.JSONL:1", {})]


def test_columns_of_one_name(tmp_path, read):
    with pytest.raises(DataError, match=r"x\.csv:1: columns of one name, 'a', 'b'"):
        read("x.csv", b"b,a,c,a,b\n")
    with pytest.raises(DataError, match=r"x\.csv:1: the header cannot be read"):
        read("x.csv", b'"a"b,c\n')
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pa.parquet.write_table(table, tmp_path / "y.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: columns of one name, 'a'"):
        read("x.parquet", (tmp_path / "y.parquet").read_bytes())


def test_arrays_that_make_no_rows(read):
    for arrays, message in (
        ({"a": np.zeros(3), "b": np.zeros((2, 3))}, r"equal first axis; there are a \(3,\), b"),
        ({"a": np.zeros(3), "b": np.zeros(())}, "equal first axis"),
        ({}, "equal first axis"),
        ({"a": np.array([{}, None])}, "arrays of numbers"),
    ):
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        with pytest.raises(DataError, match=rf"x\.npz.*{message}"):
            read("x.npz", stream.getvalue())
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    with pytest.raises(DataError, match="a single array"):
        read("x.npz", stream.getvalue())


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
