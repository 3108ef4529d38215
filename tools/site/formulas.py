"""Formulas as MathML, by latex2mathml."""

import html
import re
from xml.etree import ElementTree

from latex2mathml import converter

# What pymdownx.arithmatex makes of $...$ and $$...$$ with `generic: true`.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">'
    r"\\(?:\((?P<inline>.*?)\\\)|\[(?P<block>.*?)\\\])</(?P=tag)>",
    re.DOTALL,
)


class FormulaError(Exception):
    """A formula cannot be set; the message quotes it."""


def to_mathml(page: str) -> str:
    """The HTML of a page with MathML in place of arithmatex's spans and divisions.

    Raises:
      FormulaError: latex2mathml does not know a command, or braces do not match.
    """
    return _FORMULA.sub(_convert, page)


def _convert(match: re.Match[str]) -> str:
    inline, block = match["inline"], match["block"]
    latex = html.unescape(inline if block is None else block).strip()
    if latex.count("{") - latex.count(r"\{") != latex.count("}") - latex.count(r"\}"):
        raise FormulaError(f"the braces of the formula {latex!r} do not match")
    known = re.sub(r"\\(begin|end){aligned}", r"\\\1{align*}", latex)
    try:
        mathml = converter.convert(known, display="inline" if block is None else "block")
        tree = ElementTree.fromstring(mathml)
    except Exception as error:  # its errors have no common class
        raise FormulaError(f"the formula {latex!r} cannot be set: {error!r}") from error
    for element in tree.iter():
        if (element.text or "").startswith("\\"):
            raise FormulaError(f"{element.text} in the formula {latex!r} is unknown")
    # For those who copy it, and for what reads a page aloud.
    mathml = mathml.replace("<math ", f'<math alttext="{html.escape(latex)}" ', 1)
    return mathml if block is None else f'<div class="formula">{mathml}</div>'
