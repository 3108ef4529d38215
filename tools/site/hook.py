"""The hook of `mkdocs.yml`: adds the pages that are made of the code, and sets formulas.

python -m mkdocs build --strict      to dist/site
python -m mkdocs serve               on a local port, anew at each change of a page
"""

import functools
import pathlib
import posixpath
import re
import sys
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `mkdocs build` is started without the working folder

from tools.site import api, commands, errors, fields, formulas, notebooks  # noqa: E402

_log = get_plugin_logger("spectral_pod")

# Pages of the site that are files elsewhere in the repository.
COPIED = {
    "operations.md": "spectral_pod/ops/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "code.md": "WORKSPACE.md",
    "changes.md": "CHANGELOG.md",
}
GENERATED = {
    "reference/config.md": fields.page,
    "reference/tasks.md": fields.page_of_tasks,
    "reference/names.md": fields.page_of_names,
    "reference/trainer.md": commands.page_of_trainer,
    "reference/tools.md": commands.page_of_tools,
    "reference/launchers.md": commands.page_of_launchers,
    "reference/errors.md": errors.page,
    "reference/api.md": api.page,
    "reference/interfaces.md": api.page_of_interfaces,
}
_CODE = re.compile(r"(```.*?```|`[^`\n]*`|^ {4}[^\n]*$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?!https?:)[^)#\s]+)(#[^)\s]*)?\)")


@functools.cache  # `mkdocs serve` builds again at each change of a page
def _contents() -> dict[str, str]:
    pages = {path: make() for path, make in GENERATED.items()}
    return pages | {path: (ROOT / source).read_text() for path, source in COPIED.items()}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that no file in docs/ has."""
    for path, text in _contents().items():
        files.append(File.generated(config, path, content=text))
    for notebook in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        path = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, path, content=notebooks.page(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links that are right in the repository into those of the site.

    A file that is no page of the site is named instead.
    """
    here = page.file.src_path
    source = COPIED.get(here, f"docs/{here}")
    pages = {file: path for path, file in COPIED.items()} | {"README.md": "index.md"}

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in pages or path.startswith("docs/"):
            there = pages.get(path, path.removeprefix("docs/"))
            relative = posixpath.relpath(there, posixpath.dirname(here) or ".")
            return f"[{text}]({relative}{anchor or ''})"
        if not (ROOT / path).exists():
            _log.warning(f"{source} has a link to {target}, which there is not")
        return text if posixpath.basename(path) in text else f"{text} (`{path}`)"

    parts = _CODE.split(markdown)
    return "".join(x if i % 2 else _LINK.sub(link, x) for i, x in enumerate(parts))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Sets formulas as MathML, which browsers show without a script."""
    try:
        return formulas.to_mathml(html)
    except formulas.FormulaError as error:
        _log.warning(f"{page.file.src_path}: {error}")
        return html
