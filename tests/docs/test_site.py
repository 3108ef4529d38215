"""The site builds in strict mode without a network, loads nothing from elsewhere, and is whole."""

import html.parser
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
import yaml

from spectral_pod import config
from spectral_pod.data.tasks import TASKS
from tests.tools.test_shell import tools
from tests.trainer import ROOT
from tools.site import fields, formulas, hook, notebooks

# What Python imports at its start, here to refuse every connection.
NO_NETWORK = """
import socket
def refuse(*_, **__):
    raise OSError("the network is blocked")
socket.socket.connect = socket.getaddrinfo = refuse
"""

# What is left in a paragraph where the Markdown of a list, a table, a formula or code was not read.
BROKEN = re.compile(r"^ *[-*] .*|^\|.*\| *$|\$\$.*|```.*", re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    folder, blocked = (tmp_path_factory.mktemp(name) for name in ("site", "blocked"))
    (blocked / "sitecustomize.py").write_text(NO_NETWORK)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": f"{blocked}:{ROOT}", "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Page(html.parser.HTMLParser):
    """What a page loads, its identifiers, its classes and the texts of its paragraphs."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.ids, self.classes, self.paragraphs, self._text = [], set(), set(), [], None
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.classes |= set((found.get("class") or "").split())
        self.ids.add(found.get("id"))
        loads = tag == "link" and found.get("rel") not in ("canonical", "next", "prev")
        self.loads += [found[name] for name in ("src", "srcset", "data") if name in found]
        self.loads += [found["href"]] if loads else []
        if tag == "p":
            self._text = ""

    def handle_endtag(self, tag):
        if tag == "p" and self._text is not None:
            self.paragraphs.append(self._text)
            self._text = None

    def handle_data(self, data):
        if self._text is not None:
            self._text += data


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def sources(nav):
    """The pages that the navigation names."""
    for item in nav:
        if isinstance(item, str):
            yield item
        else:
            for below in item.values():
                yield from [below] if isinstance(below, str) else sources(below)


def nav():
    text = (ROOT / "mkdocs.yml").read_text()
    return list(sources(yaml.safe_load(text)["nav"]))


def test_every_page_is_in_it_and_is_found_by_search(site, pages):
    expected = {page.removesuffix(".md") + ".html" for page in nav()}
    assert expected <= pages.keys()
    index = json.loads((site / "search/search_index.json").read_text())
    assert expected <= {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert (site / "search/search_index.js").exists()  # for those who open it from disk


def test_it_loads_nothing_from_elsewhere(site, pages):
    for name, page in pages.items():
        elsewhere = [url for url in page.loads if re.match(r"(https?:)?//", url)]
        assert not elsewhere, f"{name} loads {elsewhere}"
        assert "mermaid" not in page.classes, f"{name} would load Mermaid"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style


def test_what_it_loads_is_there(site, pages):
    for name, page in pages.items():
        for url in page.loads:
            if not url.startswith("data:") and name != "404.html":  # which names the root
                assert ((site / name).parent / url.partition("?")[0]).exists(), f"{name}: {url}"


def test_lists_tables_and_formulas_are_set(pages):
    for name, page in pages.items():
        assert "arithmatex" not in page.classes, f"{name} has a formula that is not set"
        for text in page.paragraphs:
            broken = BROKEN.search(text)
            assert not broken, f"{name}: {broken[0]}"
    assert (ROOT / "docs/math.md").read_text().count("$$") > 20


def test_every_field_is_described(pages):
    ids = pages["reference/config.html"].ids
    assert set(config.annotations()) <= ids
    for text in (fields.page(), fields.page_of_tasks()):
        rows = [line for line in text.splitlines() if line.startswith("| <span")]
        assert [row for row in rows if row.endswith("|  |")] == []


def test_descriptions_are_those_of_the_source():
    described = fields.described(config.OptimizerConfig)
    assert described["clip_norm"] == "the largest global norm of a gradient; 0: no clipping"
    assert described["b2"] == described["b1"]  # one comment for both
    assert described["learning_rate"].startswith("The peak, between linear warm-up")
    memory = fields.described(fields.MIXERS["gated_delta"])
    assert memory["head_dim"] == "H and K; there are H memories of [K, K]."
    assert fields.accepts(config.annotations()["data.seq_len"]).startswith("integer, at least 1")


def test_every_task_and_tool_has_its_section(pages):
    assert set(TASKS) <= pages["reference/tasks.html"].ids
    names = {name.replace(".", "").removesuffix("__main__") for name in tools()}
    assert names <= pages["reference/tools.html"].ids


def test_messages_are_those_of_the_code():
    page = (ROOT / "docs/howto/messages.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    files = [*(ROOT / "spectral_pod").rglob("*.py"), ROOT / "tools/shell.py"]
    code = "\n".join(path.read_text() for path in files)
    assert len(messages) > 10
    assert [message for message in messages if message not in code] == []


@pytest.mark.parametrize(
    ("latex", "message"),
    [(r"\foo x", "unknown"), (r"\frac{1}{2", "braces"), (r"a & b", "cannot be set")],
)
def test_a_formula_that_cannot_be_set_is_an_error(latex, message):
    text = latex.replace("&", "&amp;")
    with pytest.raises(formulas.FormulaError, match=message):
        formulas.to_mathml(rf'<span class="arithmatex">\({text}\)</span>')


def test_formulas_become_mathml():
    page = (
        r'<p>a <span class="arithmatex">\(x &lt; \{1\}\)</span></p>'
        r'<div class="arithmatex">\[\begin{aligned} a &amp;= b \\ c &amp;= d \end{aligned}\]</div>'
    )
    found = formulas.to_mathml(page)
    assert found.count("<math ") == 2
    assert 'alttext="x &lt; \\{1\\}"' in found
    assert "<mtable" in found
    assert "arithmatex" not in found


def test_links_out_of_the_site_become_names(caplog):
    class At:
        class file:
            src_path = "howto/mesh.md"

    def link(text):
        return hook.on_page_markdown(text, At, None, None)

    assert link("[ops](../../spectral_pod/ops/README.md#kernels)") == (
        "[ops](../operations.md#kernels)"
    )
    assert link("[a](stall.md#x) and [b](../pods.md)") == "[a](stall.md#x) and [b](../pods.md)"
    assert link("[it](../../spectral_pod/main.py)") == "it (`spectral_pod/main.py`)"
    assert link("`[it](../../none.py)`") == "`[it](../../none.py)`"
    assert "there is not" not in caplog.text
    link("[it](../../none.py)")
    assert "which there is not" in caplog.text


def test_a_notebook_has_its_code_and_outputs(tmp_path):
    v4 = nbformat.v4
    printed = v4.new_output("stream", text="two\n")
    picture = v4.new_output("display_data", data={"image/png": "aGk=\n", "text/plain": "<Figure>"})
    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("1 + 1", outputs=[printed, picture])]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    text = notebooks.page(tmp_path / "n.ipynb")
    assert text.startswith("# Title\n\n````python\n1 + 1\n````\n\n````text\ntwo\n````\n\n<img")
    assert "base64,aGk=" in text
    assert "<Figure>" not in text
