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
