"""The notebooks are valid, hold nothing of the machine that ran them, and run."""

import ast
import importlib.util
import pathlib
import re

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = ROOT / "docs/notebooks"
MAX_BYTES = 600_000
OF_A_MACHINE = re.compile(r"/(?:home|root|tmp|usr|opt|var|mnt|srv|work|Users)/")

each_notebook = pytest.mark.parametrize("name", ["fft_visualization", "python_api"])


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of_outputs(notebook):
    """By code cell, the kinds of what it shows: streams and MIME types."""
    return [
        sorted(
            {kind for output in cell.outputs for kind in output.get("data", [output.get("name")])}
        )
        for cell in code_cells(notebook)
    ]


@each_notebook
def test_is_valid_and_was_run_from_the_first_cell_to_the_last(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        ast.parse(TransformerManager().transform_cell(cell.source))
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text


@each_notebook
def test_holds_nothing_of_the_machine(name):
    notebook = read(name)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert len(nbformat.writes(notebook)) < MAX_BYTES
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
    text = nbformat.writes(notebook)
    assert not OF_A_MACHINE.search(text), OF_A_MACHINE.search(text)


@pytest.mark.slow
@each_notebook
def test_runs(name, tmp_path, monkeypatch):
    """As in a reader's kernel; its cells assert what they claim."""
    spec = importlib.util.spec_from_file_location("run", NOTEBOOKS / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    monkeypatch.delenv("XLA_FLAGS")  # of tests, which compile quickly
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = read(name)
    shown = kinds_of_outputs(notebook)
    run.execute(notebook)
    assert kinds_of_outputs(notebook) == shown
