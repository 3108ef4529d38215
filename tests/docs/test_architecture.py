"""The document of the architecture: its figures are those of results.md, and its names exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs/architecture.md").read_text()
LOST = re.findall(r"^\| (.+) \| (.+) \| \[[^]]+\]\(results\.md#([\w-]+)\) \|$", TEXT, re.M)


def sections(text):
    """The text below each heading up to the next, by the anchor of the heading."""
    parts = re.split(r"^#+ (.*)$", text, flags=re.M)[1:]
    anchors = (re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in parts[::2])
    return dict(zip(anchors, parts[1::2]))


def numbers(text):
    return re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\d)", text)


def test_figures_of_what_was_lost_are_in_the_section_that_is_named():
    results = sections((ROOT / "docs/results.md").read_text())
    assert len(LOST) > 15
    for what, figures, anchor in LOST:
        there = numbers(results[anchor])
        for number in numbers(figures):
            assert number.strip(",") in [n.strip(",") for n in there], f"{what}: {number}"


def test_links_lead_to_files_and_headings():
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", TEXT)
    assert len(links) > 20
    for file, anchor in links:
        target = ROOT / "docs" / file
        assert target.exists(), file
        assert not anchor or anchor in sections(target.read_text()), anchor


def test_files_that_are_named_exist():
    names = re.findall(r"(?<![\w/])((?:spectral_pod|docs|tests)/[\w./]+\w)", TEXT)
    assert len(names) > 25
    assert [name for name in names if not (ROOT / name).exists()] == []
