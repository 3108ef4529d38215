"""The tables of docs/results.md, and what makes them of the output of tools."""

import json
import re

import pytest

from spectral_pod import project_files
from tests import trainer
from tools import report

LINES = [
    {"step": 10, "train/loss": 2.5},
    {"step": 10, "validation/accuracy": 0.25},
    {"step": 20, "train/loss": 1.5},
    {"step": 30, "train/loss": 0.5, "validation/accuracy": 0.75},
]
WITH = ["--command=python -m measure", "--machine=2 cores"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout with an empty document, and the files of a run and of an ablation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text("# Results\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES))
    result = {"step": 30, "eval": {"split": "test", "accuracy": 0.5}, "num_params": 1234}
    (tmp_path / "result.json").write_bytes(project_files.RESULT.encode(result))
    variants = {"base": {"accuracy": 41.0}, "wide": {"accuracy": 43.5}, "failed": None}
    (tmp_path / "table.json").write_text(json.dumps({"variants": variants, "cells": []}))
    return tmp_path


def run(capfd, *argv, code=0):
    """What the tool prints on stdout, or its one line on stderr if it fails."""
    assert report.main(argv) == code
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return err.rstrip("\n") if code == 2 else out


def show(*names):
    """Writes a document that shows these tables."""
    blocks = [f"Before.\n\n<!-- table {name} -->\n<!-- end -->\n\nAfter.\n" for name in names]
    report.DOCUMENT.write_text("\n".join(blocks))


def edit(name, **changes):
    """Changes keys of NAME.json, as by hand."""
    path = report.TABLES / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(name):
    return json.loads((report.TABLES / f"{name}.json").read_text())


# ---- the document of this repository


def test_the_documents_tables_are_those_of_its_files(capfd, monkeypatch):
    monkeypatch.chdir(trainer.ROOT)
    assert run(capfd, "--check") == ""


def test_the_document_has_the_commands_of_its_tables(monkeypatch):
    monkeypatch.chdir(trainer.ROOT)
    document = re.sub(r" \\\n +", " ", report.DOCUMENT.read_text())
    files = sorted(report.TABLES.glob("*.json"))
    assert files
    for path in files:
        for command in report.TABLE.read(path)["commands"]:
            assert command in document, path


# ---- JSON to Markdown


def table(columns, rows, **more):
    return {"commands": [], "date": "2026-01-31", "machine": "m", **more} | {
        "columns": columns, "rows": rows,
    }  # fmt: skip


def test_cells():
    columns = [
        {"name": ""},
        {"name": "share", "format": "{:.1%}", "bold": "max"},
        {"name": "ms", "format": "{:,} ms", "bold": "min"},
        {"name": "error", "format": "{:.1e}"},
    ]
    rows = [["a", 0.5, 1234, 1e-7], ["b|c", 1, {"bold": 2000}, 0.0012], [None, "none", 7.25, None]]
    assert report.markdown(table(columns, rows)) == (
        "| | share | ms | error |\n"
        "|---|---|---|---|\n"
        "| a | 50.0% | 1,234 ms | 1.0e-7 |\n"
        "| b\\|c | **100.0%** | **2,000 ms** | 1.2e-3 |\n"
        "| | none | **7.25 ms** | |"
    )


def test_columns_become_rows():
    columns = [{"name": "step"}, {"name": "loss", "format": "{:.2f}"}]
    transposed = table(columns, [[1, 2.5], [1000, 1.25]], transposed=True)
    assert report.markdown(transposed) == (
        "| step | 1 | 1,000 |\n|---|---|---|\n| loss | 2.50 | 1.25 |"
    )


def test_what_is_encoded_is_read_again():
    columns = [{"name": "µ", "format": "{:.1%}"}, {"name": "b"}]
    whole = table(columns, [[0.1, "é|\n"], [None, {"bold": 3}]], commands=["x 'y'"])
    text = report.encoded(whole)
    assert report.TABLE.parse(text.encode(), "x") == whole
    assert '  [null, {"bold": 3}]' in text.split("\n")  # a row a line, for differences in git
    assert report.TABLE.parse(report.encoded(table(columns, [])).encode(), "x")["commands"] == []


def test_writing_and_checking(folder, capfd):
    run(capfd, "add", "ablation", "table.json", "--columns=accuracy", *WITH)
    run(capfd, "add", "curve", "metrics.jsonl", "--columns=step,train/loss", *WITH)
    show("curve", "ablation")
    assert run(capfd, "--check", code=1) == "curve\nablation\n"
    empty = report.DOCUMENT.read_text()
    assert run(capfd) == "curve\nablation\n"
    written = report.DOCUMENT.read_text()
    assert "Before.\n\n<!-- table ablation -->\n\n| row | accuracy |\n" in written
    assert "| wide | 43.5 |\n\n<!-- end -->\n\nAfter.\n" in written
    assert len(written) > len(empty)
    assert run(capfd, "--check") == run(capfd) == ""

    report.DOCUMENT.write_text(written.replace("43.5", "44.5"))  # a figure typed by hand
    assert run(capfd, "--check", code=1) == "ablation\n"
    assert run(capfd) == "ablation\n"
    assert report.DOCUMENT.read_text() == written

    edit("curve", rows=[[10, 2.25]])  # another measurement
    assert run(capfd, "--check", code=1) == "curve\n"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!-- table a -->\n", "'<!-- table a -->' is not of a table between"),
        ("<!-- table a -->\n<!-- table a -->\n<!-- end -->\n", "'<!-- table a -->' is not of"),
        ("<!-- end -->\n", "'<!-- end -->' is not of a table between"),
        ("<!-- table A -->\n<!-- end -->\n", "'<!-- table A -->' is not of a table between"),
        ("| ms |\n|---|\n| 7 |\n", "'| ms |' is not of a table between"),
        ("<!-- table b -->\n<!-- end -->\n", "docs/results/b.json is missing"),
        (
            "text\n",
            "does not show docs/results/a.json; write '<!-- table a -->' and '<!-- end -->'",
        ),
    ],
)
def test_a_document_that_does_not_fit(document, message, folder, capfd):
    run(capfd, "add", "a", "table.json", "--columns=accuracy", *WITH)
    report.DOCUMENT.write_text(document)
    for flags in ([], ["--check"]):
        assert message in run(capfd, *flags, code=2)
    assert report.DOCUMENT.read_text() == document


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [["base", 41.0, 1]]}, "rows.0 has 3 cells, and there are 2 columns"),
        ({"rows": [["base", True]]}, "rows.0.1"),
        ({"rows": [["base", float("nan")]]}, "rows.0.1"),
        ({"rows": [["base", {}]]}, "rows.0.1"),
        ({"columns": [{"name": "x"}, {"name": "y", "format": "%d"}]}, "format of Python"),
        ({"columns": [{"name": "x"}, {"name": "y", "format": "{:d}"}]}, "columns.1.format"),
        ({"columns": [{"name": "x"}, {"name": "y", "digits": 2}]}, "columns.1.digits"),
        ({"date": "today"}, "date"),
        ({"commands": None}, "commands"),
    ],
)
def test_a_damaged_table_is_named(changes, message, folder, capfd):
    run(capfd, "add", "a", "table.json", "--columns=accuracy", *WITH)
    show("a")
    edit("a", **changes)
    line = run(capfd, "--check", code=2)
    assert line.startswith("DataError: docs/results/a.json cannot be used: ")
    assert message in line


def test_without_a_document(folder, capfd):
    report.DOCUMENT.unlink()
    assert "there is no docs/results.md here" in run(capfd, code=2)


# ---- the output of tools to JSON


def test_steps_of_a_run(folder, capfd):
    flags = ["--columns=step,validation/accuracy,train/loss", *WITH]
    out = run(capfd, "add", "curve", "metrics.jsonl", *flags, "--steps=10,30")
    assert out == (
        "| step | validation/accuracy | train/loss |\n|---|---|---|\n"
        "| 10 | 0.25 | 2.5 |\n| 30 | 0.75 | 0.5 |\n"
    )
    run(capfd, "add", "curve", "metrics.jsonl", "--columns=step,validation/accuracy")
    assert read("curve")["rows"] == [[10, 0.25], [30, 0.75]]  # there are no others
    assert read("curve")["commands"] == ["python -m measure"]


def test_what_is_declared_by_hand_stays_when_measured_again(folder, capfd):
    run(capfd, "add", "a", "table.json", "--columns=accuracy", *WITH)
    assert read("a")["rows"] == [["base", 41.0], ["wide", 43.5]]  # of the others there is nothing
    columns = [
        {"name": "variant", "field": "row"},
        {"name": "of all", "field": "accuracy", "format": "{:.0f}%", "bold": "max"},
    ]
    edit("a", columns=columns, transposed=True)
    variants = {"base": {"accuracy": 60.5}, "wide": {"accuracy": 13.5}}
    (folder / "table.json").write_text(json.dumps({"variants": variants}))
    out = run(capfd, "add", "a", "table.json", "--machine=4 cores")
    assert out == "| variant | base | wide |\n|---|---|---|\n| of all | **60%** | 14% |\n"
    assert read("a")["columns"] == columns
    assert (read("a")["machine"], read("a")["commands"]) == ("4 cores", ["python -m measure"])


def test_a_row_for_each_run(folder, capfd):
    flags = ["add", "mixers", "result.json"]
    run(capfd, *flags, "--row=hyena", "--columns=eval.accuracy,num_params", *WITH)
    run(capfd, *flags, "--row=attention", "--command=another")
    other = {"step": 30, "eval": {"split": "test", "accuracy": 0.75}, "num_params": 99}
    (folder / "result.json").write_bytes(project_files.RESULT.encode(other))
    run(capfd, *flags, "--row=hyena")
    assert read("mixers")["rows"] == [["hyena", 0.75, 99], ["attention", 0.5, 1234]]
    assert read("mixers")["commands"] == ["python -m measure", "another"]
    before = read("mixers")
    line = run(capfd, *flags, "--row=s5", "--columns=step", code=2)
    assert '--row: the first column of docs/results/mixers.json must have "field": "row"' in line
    assert read("mixers") == before


@pytest.mark.parametrize(
    ("content", "flags", "rows"),
    [
        ([{"a": {"b": 1}}, {"a": {"b": 2}}], ["--columns=a.b"], [[1], [2]]),  # tools.bench.scaling
        ({"ratios": {"x": 2.5}, "rows": []}, ["--rows=ratios", "--columns=value"], [["x", 2.5]]),
        ({"layers": [["b", 1.5]]}, ["--rows=layers", "--columns=0,1"], [["b", 1.5]]),  # profile
        ({"plain": {"exact": 0.5}, "ok": True}, ["--columns=plain.exact"], [[0.5]]),  # agents
        ({"models": {"s5": {"mean": 3}}}, ["--columns=mean"], [["s5", 3]]),  # tools.lra
    ],
)
def test_reports_of_tools(content, flags, rows, folder, capfd):
    (folder / "x.json").write_text(json.dumps(content))
    run(capfd, "add", "x", "x.json", *flags, *WITH)
    assert read("x")["rows"] == rows


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["A b", "table.json"], "the name 'A b' must be of"),
        (["a", "gone.json"], "there is no file gone.json"),
        (["a", "docs"], "there is no file docs"),
        (["a", "docs/results.md", *WITH], "docs/results.md cannot be used"),
        (["a", "table.json", *WITH], "--columns is missing; table.json has row, accuracy"),
        (["a", "table.json", "--columns=acuracy", *WITH], "no field 'acuracy'; did you mean"),
        (["a", "table.json", "--columns=accuracy", WITH[0]], "--machine is missing"),
        (["a", "table.json", "--columns=accuracy", WITH[1]], "--command is missing"),
        (["a", "table.json", "--rows=x", *WITH], "--rows is 'x'; table.json has variants, cells"),
        (["a", "table.json", "--row=x", *WITH], "--row names one row, and table.json has 3"),
        (["a", "metrics.jsonl", "--steps=15", *WITH], "--steps: metrics.jsonl has no step 15"),
        (["a", "metrics.jsonl", "--steps=x", *WITH], "--steps is 'x'"),
        (["a", "empty.jsonl", *WITH], "empty.jsonl has no metrics"),
        (["a", "broken.json", *WITH], "broken.json cannot be used"),
        (["a", "nan.json", "--columns=x", *WITH], "rows.0.0"),
        (["a", "nan.json", "--columns=ok", *WITH], "nan.json has no field 'ok'"),  # no figure
    ],
)
def test_mistakes(argv, message, folder, capfd):
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.json").write_text('{"variants": ')
    (folder / "nan.json").write_text('{"x": NaN, "ok": true}')
    assert message in run(capfd, "add", *argv, code=2)
    assert not report.TABLES.exists()


def test_a_changed_result_is_refused(folder, capfd):
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text.replace("1234", "1235"))
    line = run(capfd, "add", "a", "result.json", "--columns=num_params", *WITH, code=2)
    assert "result.json cannot be used: its content differs from its checksum" in line
