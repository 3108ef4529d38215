"""Every section of docs/math.md names code and tests that exist."""

import ast
import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs/math.md").read_text()
TEST = re.compile(r"(tests/\w[\w/]*\.py)::(\w+)")
CODE = re.compile(r"`(spectral_pod/\w[\w/]*\.py):([\w.]+)`")


def sections():
    """By number, the text of every section without that of its subsections."""
    parts = re.split(r"^#{2,3} (\d[\d.]*) .*$", TEXT, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@functools.cache
def defined(path):
    """The functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


def test_every_section_names_a_test():
    texts = sections()
    assert [number for number in texts if number.endswith(".")] == [f"{i}." for i in range(1, 10)]
    for number, text in texts.items():
        # A section that is divided names the tests in its parts.
        divided = f"{number}1" in texts
        assert divided or TEST.search(text), number


def test_the_tests_that_are_named_exist():
    for path, name in TEST.findall(TEXT):
        assert name in defined(path), f"{path}::{name}"


def test_the_code_that_is_named_exists():
    named = CODE.findall(TEXT)
    assert len(named) > 30
    for path, name in named:
        assert name in defined(path), f"{path}:{name}"


def test_the_document_names_all_tests_of_its_formulas():
    path = "tests/docs/test_math.py"
    tests = {name for name in defined(path) if name.startswith("test_")}
    assert tests == {name for where, name in TEST.findall(TEXT) if where == path}
