"""Unusual files are read byte for byte, and errors of unreadable ones name what is wrong."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from spectral_pod.data import formats, text
from spectral_pod.errors import DataError
from tests.data.files import COMPRESS, reader

compressions = pytest.mark.parametrize("compression", [c for c in COMPRESS if c])


@pytest.fixture
def read(tmp_path):
    return reader(tmp_path)


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
