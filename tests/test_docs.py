"""Commands in the documentation name configs, presets and fields that exist."""

import ast
import pathlib
import re

import pytest

from spectral_pod.config import default, flat
from tests.test_configs import FORMS, load

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.py"),
    *ROOT.glob("tools/*.py"), *ROOT.glob("tools/bench/*.py"),
]  # fmt: skip
FIELDS = default()


def config(name, preset):
    return load(name).get_config(*([preset] if preset else []))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_name_what_exists(path):
    text = path.read_text()
    text = text if path.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""
    for name, preset in re.findall(r"configs/(\w+)\.py(?::(\w+))?", text):
        assert name in FORMS or name.isupper(), name
        assert not preset or preset in FORMS[name], f"{name}:{preset}"
    known = flat(FIELDS.to_dict()).keys()
    for field in re.findall(r"--config\.([\w.]+)=", text):
        placeholder = field.lower() == "field" or field.startswith("data.options.")
        assert field in known or placeholder, field
    for tool in re.findall(r"python -m (tools\.[a-z_.]*[a-z])", text):
        stem = ROOT.joinpath(*tool.split("."))
        assert stem.with_suffix(".py").exists() or (stem / "__main__.py").exists(), tool


def test_the_table_of_short_runs_has_the_steps_and_batches_of_its_configs():
    table = (ROOT / "docs/results.md").read_text().partition("## One model on six kinds")[2]
    rows = re.findall(
        r"\| `(\w+)\.py(?::([\w,]+))?` \| [\w ]*?([\d,]+) \| (?:[\d,]+ of )?([\d,]+) x (\d+) \|",
        table,
    )
    assert len(rows) == 6
    for name, preset, length, steps, batch in rows:
        c = config(name, preset)
        assert int(length.replace(",", "")) == c.data.seq_len, name
        assert int(steps.replace(",", "")) == c.train.total_steps, name
        assert int(batch) == c.train.global_batch_size, name


def measured(text):
    """Figures with decimals and a unit, such as 54.9% and 1.5 ms, outside of blocks of code."""
    text = re.sub(r"```.*?```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    # Several figures may share a unit: "0.63 / 1.5 / 8.8 ms".
    unit = r"(?= ?(?:%|(?:[kMG]i?B(?:/s)?|ms|s|us|minutes|nats|points|times)\b))"
    number = r"\d[\d,]*\.\d+"
    shared = re.findall(rf"(?:{number}(?:, | / | to | and | or ))*{number}{unit}", text)
    return {figure for run in shared for figure in re.findall(number, run)}


@pytest.mark.parametrize(
    "path",
    sorted(
        {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.py")}
        - {ROOT / "docs/results.md", ROOT / "docs/todo.md"}
    ),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_figures_of_a_page_are_in_the_results(path):
    text = path.read_text()
    text = text if path.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""
    known = re.findall(r"\d[\d,]*\.\d+", (ROOT / "docs/results.md").read_text())
    assert not measured(text) - set(known)
