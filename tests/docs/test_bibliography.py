"""The bibliography has every work that is cited, and names files that exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
BIBLIOGRAPHY = ROOT / "docs/bibliography.md"
CITING = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.py"),
    *ROOT.glob("spectral_pod/**/*.py"), *ROOT.glob("spectral_pod/**/*.md"),
    *ROOT.glob("tools/**/*.py"),
]  # fmt: skip
# "Yang et al. 2024", "Zhu and Gupta (2017", "van der Hoeven 2002, "; the last only with a comma, a
# bracket or a semicolon after the year, as months and programs have years as well.
NAME = r"(?:[Vv]an der )?[A-Z][\w-]*[a-z](?: Loan)?"
CITED = re.compile(
    rf"({NAME}) et al\.,? \(?((?:19|20)\d\d)|"
    rf"({NAME}) and (?:[Vv]an (?:der )?)?{NAME},? \(?((?:19|20)\d\d)"
)


def plain(text):
    """The text of a file in one line, without the marks of comments."""
    return re.sub(r"\s+(?:# )?", " ", text)


def citations(text):
    """(first author, year) of each citation; a bare "et al. 2022" after a semicolon has both."""
    return {(a or c, b or d) for a, b, c, d in CITED.findall(plain(text))}


def test_every_work_that_is_cited_is_there():
    known = citations(BIBLIOGRAPHY.read_text())
    cited = {
        key: str(path.relative_to(ROOT))
        for path in CITING
        if path != BIBLIOGRAPHY
        for key in citations(path.read_text())
    }
    assert len(cited) > 40
    assert {key: file for key, file in cited.items() if key not in known} == {}


def test_numbers_of_preprints_are_in_the_year_that_they_say():
    """The first two digits are the year; a work is cited by it, or by the years of its journal."""
    entries = re.findall(
        r"\*\*[^*]*?((?:19|20)\d\d)[^*]*\*\*[^*]*?arXiv:(\d\d)(\d\d)\.\d{4,5}",
        plain(BIBLIOGRAPHY.read_text()),
    )
    assert len(entries) > 50
    for year, number, month in entries:
        assert 0 <= int(year) - 2000 - int(number) <= 2, (year, number)
        assert 1 <= int(month) <= 12


def test_files_that_are_named_exist():
    names = re.findall(r"`((?:spectral_pod|configs|tools|tests|docs)/[\w./]+)`", plain(
        BIBLIOGRAPHY.read_text()
    ))  # fmt: skip
    assert len(names) > 50
    assert [name for name in names if not (ROOT / name).exists()] == []
