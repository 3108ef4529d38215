"""Exact arithmetic on a text: integers, decimals, + - * / // % ** and parentheses.

    >>> calculate("2**70 + 1"), calculate("0.1 + 0.2"), calculate("10/4")
    ('1180591620717411303425', '0.3', '2.5')
    >>> calculate("1/3")
    '1/3, about 0.333333333333'

The text is parsed, by Python's own parser, and never evaluated; numbers are fractions, of bounded
size.
"""

import ast
import decimal
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 1000  # of a text: deeper nesting than this allows exhausts the stack of the parser
MAX_BITS = 10_000  # of a numerator or denominator: about 3,000 digits
_MAX_PLACES = 1000  # after the decimal point

_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The value of an expression: an integer or a decimal, or a fraction where neither is exact.

    Raises:
      ValueError: it is no such expression, divides by 0, or a number gets too large; says which.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression has more than {MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _shown(_value(tree.body, expression.strip()))
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is no expression: {error.msg}") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (RecursionError, MemoryError):
        raise ValueError("the expression is nested too deeply") from None


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant):
        source = ast.get_source_segment(text, node) or ""
        if not _NUMBER.fullmatch(source):
            raise ValueError(f"{source!r} is no number; write it in digits, such as 1200 or 0.5")
        return Fraction(source.removesuffix("."))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(node.op)](left, right)))
    what = ast.get_source_segment(text, node) or text
    raise ValueError(f"{what!r} is not of numbers, + - * / // % ** and parentheses")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("an exponent must be an integer")
    # The size of a power is known before it is computed; those of 0, 1 and -1 have 0 bits.
    if _bits(base) * abs(exponent.numerator) > MAX_BITS:
        raise ValueError(f"a power has more than {MAX_BITS} bits")
    return _bounded(Fraction(base**exponent.numerator))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length()) - 1


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise ValueError(f"a number has more than {MAX_BITS} bits")
    return value


def _shown(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    places, rest = 0, value.denominator
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        places = max(places, power)
    if rest == 1 and places <= _MAX_PLACES:
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    with decimal.localcontext(prec=12):
        about = decimal.Decimal(value.numerator) / value.denominator
    return f"{value}, about {about}"
