"""Files as strangers have them: damaged, enormous, linked, of other encodings and column types."""

import bz2
import codecs
import csv
import functools
import gzip
import io
import lzma
import os
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from spectral_pod.data import formats, origin
from spectral_pod.data.columnar import Unreadable
from spectral_pod.data.formats import Fault, Row
from spectral_pod.errors import DataError

COMPRESS = {
    ".gz": gzip.compress,
    ".bgz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": functools.partial(lzma.compress, preset=0),
    ".zst": zstandard.ZstdCompressor().compress,
}
property_test = hypothesis.settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def read(tmp_path):
    def read_once(name, content, **options):
        (tmp_path / name).write_bytes(content)
        return list(formats.rows(str(tmp_path / name), **options))

    return read_once


# ---- a few bytes that expand to many


@pytest.mark.parametrize(
    ("compression", "copies", "size", "bound"),
    [(".gz", 2, 12, 8), (".bz2", 2, 12, 8), (".xz", 2, 12, 8), (".zst", 1, 120, 80)],  # MB
)
def test_what_expands_takes_little_memory(tmp_path, monkeypatch, compression, copies, size, bound):
    """One line of zeros, of which memory holds a part."""
    monkeypatch.setattr(formats, "MAX_BYTES", 1_000_000)
    path = tmp_path / f"x.txt{compression}"
    path.write_bytes(COMPRESS[compression](bytes(size * 10**6)) * copies)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        (fault,) = formats.rows(str(path))
        assert tracemalloc.get_traced_memory()[1] < bound * 1e6
    finally:
        tracemalloc.stop()
    assert fault == Fault(f"{path}:1", "too long: more than 1,000,000 bytes")


@pytest.mark.parametrize("compression", ["", *COMPRESS])
def test_a_compressed_document_has_a_limit(read, monkeypatch, compression):
    """Another one is as large as its file, and has none."""
    monkeypatch.setattr(formats, "MAX_BYTES", 1000)
    compress = COMPRESS.get(compression, bytes)
    for size in (1000, 1001):
        name = f"x{compression}"
        (row,) = read(name, compress(bytes(size)), format="document")
        if size == 1000 or not compression:
            assert row.fields["text"] == bytes(size)
        else:
            assert row.reason.startswith("too long: more than 1,000 bytes once decompressed; ")


def test_lines_of_many_values_are_faults(read, monkeypatch):
    """An empty list takes three bytes in a line and seventy in memory."""
    monkeypatch.setattr(formats, "MAX_COMMAS", 100)
    first, second = read("x.jsonl", b'{"a": [%s]}\n{"a": "b"}\n' % b",".join([b"[]"] * 102))
    assert first.reason == "too many values: more than 100 commas"
    assert second.fields == {"a": b"b"}


def test_arrays_larger_than_memory_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(1_000_000))
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # pages, and bytes in a page
    with pytest.raises(DataError, match=r"x\.npz .*8,000,\d+ bytes of this host's 1,000,000"):
        list(formats.rows(str(tmp_path / "x.npz")))


# ---- quotes of CSV


words = st.text("abc ,;é", min_size=1, max_size=8).map(lambda text: f"x{text}")
tables = st.lists(st.tuples(words, words), min_size=1, max_size=12)
damages = {
    "not closed": lambda text: f'"{text}',
    "not opened": lambda text: f'{text.replace(",", "")}"',
    "closed early": lambda text: f'"{text}" "{text}"',
}


@property_test
@hypothesis.given(
    tables,
    st.sets(st.integers(0, 11), min_size=1, max_size=4),
    st.sampled_from(sorted(damages)),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_malformed_row_is_lost_alone(read, table, bad, how, newline, all_quoted, two_lines, end):
    """All others are read, and one is counted for each that is not."""
    lines, good = ["text,label"], []
    for i, (text, label) in enumerate(table):
        label = label.replace(",", "")
        if i in bad:
            lines.append(f"{damages[how](text)},{label}")
            continue
        text += '\nand "more"' * two_lines
        stream = io.StringIO()
        quoting = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
        csv.writer(stream, lineterminator="", quoting=quoting).writerow([text, label])
        lines.append(stream.getvalue())
        good.append((text.encode(), label.encode()))
    rows = read("x.csv", (newline.join(lines) + newline * end).encode())
    found = [(r.fields["text"], r.fields["label"]) for r in rows if isinstance(r, Row)]
    assert set(good) <= set(found)
    assert len(rows) == len(table)
    if how != "not opened":  # which is a quote like any other in the field, except after a fault
        assert found == good


def test_an_unclosed_quote_does_not_take_the_rest_of_the_file(read, monkeypatch):
    lines = [b"row %d,%d" % (i, i % 3) for i in range(60)]
    lines[10] = b'"' + lines[10]
    rows = read("x.csv", b"text,label\n" + b"\n".join(lines))
    assert [row.place.rpartition(":")[2] for row in rows] == [str(n) for n in range(2, 62)]
    faults = [row for row in rows if isinstance(row, Fault)]
    assert [fault.reason for fault in faults] == ["malformed row: unexpected end of data"]
    monkeypatch.setattr(formats, "MAX_OPEN_BYTES", 100)
    again = read("x.csv", b"text,label\n" + b"\n".join(lines))
    assert again[:10] + again[11:] == rows[:10] + rows[11:]
    assert again[10].reason == "malformed row: a quote that is open for more than 100 bytes"


def test_the_end_of_a_malformed_text_is_no_row(read):
    rows = read("x.csv", b'text,label\n"he said "hi" to me\nand left",0\ntwo,1\n')
    assert [type(row) for row in rows] == [Fault, Fault, Row]


def test_headers_of_files_that_were_joined_are_faults(read):
    rows = read("x.csv", b"text,label\na,0\ntext,label\nb,1\n")
    assert [getattr(row, "reason", "") for row in rows] == ["", "a second header", ""]
    assert all(isinstance(row, Row) for row in read("y.csv", b"text\na\ntext\n"))


# ---- encodings


@property_test
@hypothesis.given(
    st.lists(st.text(st.characters(exclude_characters="\r\n"), max_size=6), max_size=5),
    st.sampled_from(["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]),
    st.booleans(),
)
def test_utf_16_and_32_are_read_as_utf_8(read, lines, encoding, compressed):
    content = ("\ufeff" + "\n".join(lines)).encode(encoding, "surrogatepass")
    content = gzip.compress(content) if compressed else content
    rows = read("x.txt" + ".bgz" * compressed, content)
    expected = "\n".join(lines).encode("utf-8", "surrogatepass").split(b"\n")
    if expected[-1] == b"":  # what follows the last end of a line is no line
        expected.pop()
    assert [row.fields["text"] for row in rows] == expected


def test_tables_of_spreadsheets(read):
    """Spreadsheets save UTF-16, with tabs, as 'Unicode text'."""
    content = codecs.BOM_UTF16_LE + "text\tlabel\r\né😀\t1\r\n".encode("utf-16-le")
    assert [row.fields for row in read("x.tsv", content)] == [
        {"text": "é😀".encode(), "label": b"1"}
    ]
    with pytest.raises(DataError, match=r"x\.tsv is damaged .*truncated data"):
        read("x.tsv", content[:-1])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("text,label\na,1\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("text,label\na,1\n".encode("utf-16-be"), "UTF-16 without a byte order mark"),
        (gzip.compress(b"text,label\na,1\n"), r"a file of gzip; unpack it, or .* the suffix \.gz"),
        (bz2.compress(b"text,label\na,1\n"), r"a file of bzip2; unpack it, or .* the suffix \.bz2"),
        (lzma.compress(b"text,label\na,1\n"), "a file of xz"),
        (zstandard.compress(b"text,label\na,1\n"), "a file of zstd"),
        (b"PK\x03\x04", "a file of zip; unpack it$"),
        (b"a.csv".ljust(257, b"\0") + b"ustar", "a file of tar; unpack it$"),
    ],
    ids=["little", "big", "gzip", "bzip2", "xz", "zstd", "zip", "tar"],
)
def test_what_is_no_text_is_said(read, content, what):
    with pytest.raises(DataError, match=rf"x\.csv is no text in UTF-8, but looks like {what}"):
        read("x.csv", content)


# ---- columns


STRINGS = [b"a", None, b"bc" * 20]
NUMBERS = [[1, 2], None, [255, 0]]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
        pa.binary_view(), pa.dictionary(pa.int8(), pa.string()), pa.json_(),
    ],
    ids=str,
)  # fmt: skip
def test_texts_of_parquet(tmp_path, kind):
    storage = pa.string() if kind == pa.json_() else kind
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view():
        values = pa.array(STRINGS, kind)
    else:
        values = pa.array([text and text.decode() for text in STRINGS]).cast(storage)
    assert column_of(tmp_path, values.cast(kind)) == STRINGS


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.uint8()), pa.large_list(pa.uint8()), pa.list_(pa.uint8(), 2),
        pa.list_view(pa.uint8()), pa.large_list_view(pa.uint8()),
        pa.fixed_shape_tensor(pa.uint8(), [2]),
    ],
    ids=str,
)  # fmt: skip
def test_lists_of_parquet(tmp_path, kind):
    if isinstance(kind, pa.FixedShapeTensorType):
        values = pa.ExtensionArray.from_storage(kind, pa.array(NUMBERS, kind.storage_type))
    else:
        values = pa.array(NUMBERS, kind)
    first, null, last = column_of(tmp_path, values)
    assert (first.dtype, first.tolist(), null, last.tolist()) == (np.uint8, [1, 2], None, [255, 0])


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 1001], pa.time64("ns")),
        pa.array([1, 1001], pa.duration("ns")),
        pa.ListArray.from_arrays([0, 1, 2], pa.array([b"\xff", b"a"]).view(pa.string())),
        pa.StructArray.from_arrays([pa.array([b"\xff", b"a"]).view(pa.string())], ["s"]),
    ],
    ids=lambda values: str(values.type),
)
def test_what_cannot_be_read_of_parquet_has_its_type(tmp_path, values):
    """The other columns can still be used."""
    kind = str(values.type).replace("item", "element")  # as parquet names it
    assert column_of(tmp_path, values) == [Unreadable(kind)] * 2


def column_of(tmp_path, values):
    table = pa.table({"c": values, "i": range(len(values))})
    pa.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    rows = list(formats.rows(str(tmp_path / "x.parquet")))
    assert [row.fields["i"] for row in rows] == list(range(len(values)))
    return [row.fields["c"] for row in rows]


def test_checksums_of_parquet_are_verified(read):
    text = "a text that is in the file as it is"
    stream = io.BytesIO()
    table = pa.table({"text": [text]})
    pa.parquet.write_table(
        table, stream, write_page_checksum=True, compression="none", use_dictionary=False,
        write_statistics=False, store_schema=False,
    )  # fmt: skip
    content = stream.getvalue()
    assert content.count(text.encode()) == 1
    assert read("x.parquet", content)[0].fields == {"text": text.encode()}
    with pytest.raises(DataError, match=r"x\.parquet is damaged .* CRC"):
        read("x.parquet", content.replace(text.encode(), text.upper().encode()))


# ---- damage


@functools.cache
def sound_files():
    texts = [f'row {i}, "é"' for i in range(20)]
    table = pa.table({"text": texts, "label": range(20), "pixels": [[1, 2]] * 20})
    parquet, npz, lines = io.BytesIO(), io.BytesIO(), io.StringIO()
    pa.parquet.write_table(table, parquet, write_page_checksum=True)
    np.savez_compressed(npz, text=np.array(texts), label=np.arange(20))
    csv.writer(lines).writerows([("text", "label"), *zip(texts, range(20))])
    contents = {
        "parquet": parquet.getvalue(),
        "npz": npz.getvalue(),
        "csv": lines.getvalue().encode(),
        "jsonl": b'{"text": "a \\u00e9", "label": 1}\n' * 20,
        "fq": b"@r x\nACGT\n+\n!!!!\n" * 20,
    }
    compressed = {f"csv{c}": compress(contents["csv"]) for c, compress in COMPRESS.items()}
    return contents | compressed


def check_damaged_files(read, data):
    name, content = data.draw(st.sampled_from(sorted(sound_files().items())))
    for _ in range(data.draw(st.integers(1, 3))):
        at, size = data.draw(st.integers(0, len(content))), data.draw(st.sampled_from([0, 1, 40]))
        content = content[:at] + data.draw(st.binary(max_size=8)) + content[at + size :]
    message = ""
    try:
        assert all(isinstance(row, Row | Fault) for row in read(f"x.{name}", content))
    except DataError as error:
        message = str(error)
    assert not message or f"x.{name}" in message


@property_test
@hypothesis.given(st.data())
def test_damaged_files_are_faults_or_errors(read, data):
    check_damaged_files(read, data)


@pytest.mark.slow
@hypothesis.settings(property_test, max_examples=3000)
@hypothesis.given(st.data())
def test_many_damaged_files_are_faults_or_errors(read, data):
    check_damaged_files(read, data)


# ---- links, and what others write beside data


@pytest.fixture
def folder(tmp_path):
    """`set/a.csv`, and `elsewhere/b.csv`."""
    for name in ("set/a.csv", "elsewhere/b.csv"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"x\n{name}\n")
    return tmp_path / "set"


def names(folder, source=""):
    return [os.path.relpath(path, folder) for path in formats.files(f"{folder}{source}")]


def test_links_are_followed(folder):
    (folder / "folder").symlink_to("../elsewhere")
    (folder / "chain").symlink_to(folder / "folder")
    (folder / "file.csv").symlink_to(folder.parent / "elsewhere/b.csv")
    everything = ["a.csv", "chain/b.csv", "file.csv", "folder/b.csv"]
    assert names(folder) == names(folder, "/**/*.csv") == names(folder, "/**") == everything
    assert names(folder, "/*.csv") == ["a.csv", "file.csv"]
    assert names(folder, "/*/*") == names(folder, "/[cf]*/*") == ["chain/b.csv", "folder/b.csv"]
    (folder.parent / "link").symlink_to(folder)
    assert names(folder.parent, "/link") == [f"link/{name}" for name in everything]
    assert names(folder.parent, "/link/*.csv") == ["link/a.csv", "link/file.csv"]


@pytest.mark.parametrize("source", ["", "/**", "/**/*.csv"])
@pytest.mark.parametrize("above", [".", "..", "sub/.."])
def test_a_link_to_a_folder_that_it_is_in_is_named(folder, source, above):
    (folder / "sub").mkdir()
    (folder / "sub/loop").symlink_to(folder / above)
    with pytest.raises(DataError, match=r"set/sub/loop is a link to .* that it is in; remove"):
        formats.files(f"{folder}{source}")
    (folder / "sub/loop").rename(folder / "sub/.loop")
    assert names(folder, source) == ["a.csv"]


@pytest.mark.parametrize("source", ["", "/*", "/*.csv", "/**", "/**/*.csv", "/link.csv"])
@pytest.mark.parametrize("target", ["gone", "link.csv", "a.csv/below"])
def test_a_broken_link_is_named(folder, source, target):
    (folder / "link.csv").symlink_to(target)
    with pytest.raises(DataError, match=rf"set/link\.csv is a broken link, to {target}; restore"):
        formats.files(f"{folder}{source}")
    (folder / "link.csv").rename(folder / ".link.csv")
    if source != "/link.csv":
        assert names(folder, source) == ["a.csv"]


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.csv")
    for source in ("", "/*", "/pipe.csv"):
        with pytest.raises(DataError, match=r"set/pipe\.csv is neither a file nor a folder"):
            formats.files(f"{folder}{source}")


def test_a_change_behind_a_link_is_seen(folder):
    (folder / "link.csv").symlink_to("../elsewhere/b.csv")
    files = formats.files(str(folder))
    described = origin.describe(files)
    target = folder.parent / "elsewhere/b.csv"
    target.write_text(target.read_text().upper())
    os.utime(target, (0, 0))
    with pytest.raises(DataError, match="has changed"):
        origin.check(files, described, "it", "store")


def test_what_spark_writes_beside_data_is_left_out(folder):
    for name in ("_SUCCESS", "_committed_81", "_started_81", ".a.csv.crc", "._SUCCESS.crc",
                 "a.csv.crc", "_metadata", "_common_metadata", "_temporary/0/b.csv"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no data")
    assert names(folder) == names(folder, "/*") == names(folder, "/**") == ["a.csv"]
    assert names(folder, "/_SUCC*") == names(folder, "/_SUCCESS") == ["_SUCCESS"]
    (folder / "_delta_log").mkdir()
    (folder / "_delta_log/0.json").touch()
    with pytest.raises(DataError, match="Delta table"):
        formats.files(str(folder))
