"""Runs notebooks of this folder and keeps their outputs in them, but nothing of the machine.

PYTHONPATH=. python docs/notebooks/run.py [NAME ...]      # all by default
"""

import pathlib
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent
CELL_SECONDS = 1800


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells of a notebook in a new kernel and an empty folder, in place.

    Raises:
      CellExecutionError: a cell raised an exception.
    """
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata.language_info = {"name": "python"}  # without Python's version


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
            execute(notebook)
            nbformat.write(notebook, path)
            print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
