"""Notebooks as pages: their text, code and recorded outputs."""

import pathlib
from collections.abc import Iterator
from typing import Any

import nbformat

_PICTURE = '<img alt="Output of the cell above" src="data:image/png;base64,{}">'


def page(path: pathlib.Path) -> str:
    """A notebook in Markdown; nothing is run."""
    notebook = nbformat.read(path, as_version=4)
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code" and cell.source.strip():
            parts += [_fenced("python", cell.source), *_outputs(cell)]
    parts.append(f"The notebook is `docs/notebooks/{path.name}`.")
    return "\n\n".join(parts) + "\n"


def _outputs(cell: Any) -> Iterator[str]:
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            yield _PICTURE.format("".join(data["image/png"].split()))
        elif text := output.get("text") or data.get("text/plain"):
            yield _fenced("text", text)


def _fenced(language: str, text: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"
