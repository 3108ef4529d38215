"""The calculator: exact, bounded, and nothing but arithmetic."""

import decimal
import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_pod.agent import calculator
from spectral_pod.agent.calculator import calculate

INTS = st.integers(-(10**40), 10**40)
DECIMALS = st.decimals(min_value=0, max_value=10**12, places=6)


@given(INTS, INTS, st.sampled_from("+-*"))
def test_integers_are_those_of_python(a, b, sign):
    expected = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](a, b)
    assert calculate(f"({a}) {sign} ({b})") == str(expected)


@given(INTS, INTS.filter(bool))
def test_division(a, b):
    assert calculate(f"({a}) // ({b})") == str(a // b)
    assert calculate(f"({a}) % ({b})") == str(a % b)
    assert Fraction(calculate(f"({a}) / ({b})").partition(",")[0]) == Fraction(a, b)


@given(DECIMALS, DECIMALS, st.sampled_from("+-*"))
def test_decimals_are_exact(a, b, sign):
    with decimal.localcontext(prec=100):
        expected = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](a, b)
    assert Fraction(calculate(f"{a:f}{sign}{b:f}")) == Fraction(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" 1 + 2 * 3 ", "7"), ("-2**2", "-4"), ("(-2)**3", "-8"), ("2**-3", "0.125"),
        ("0.1+0.2", "0.3"), ("1/3", "1/3, about 0.333333333333"), ("-1/8", "-0.125"),
        ("7//2*2+7%2", "7"), ("1.50*2", "3"), (".5+5.", "5.5"), ("(-1)**999999999999", "-1"),
        ("0**99999999999999", "0"), ("1**-99999999999999", "1"), ("0**0", "1"), ("(-1)**0", "1"),
        ("2**10000 % 10", "6"), ("-0.05", "-0.05"), ("(-1)**-3", "-1"), ("1**" + "9" * 900, "1"),
    ],
)  # fmt: skip
def test_values(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no expression"),
        ("1+", "no expression"),
        ("1/0", "division by zero"),
        ("0**-1", "division by zero"),
        ("2**0.5", "an exponent must be an integer"),
        ("2**10001", "a power has more than"),
        ("9**9**9**9", "a power has more than"),
        ("(1/3)**99999", "a power has more than"),
        ("*".join(["2**9999"] * 20), "a number has more than"),
        ("1e5", "'1e5' is no number; write it in digits"),
        ("1e999999999", "no number"),
        ("0x10", "no number"),
        ("1_000", "no number"),
        ("3j", "no number"),
        ("'a'*9", "\"'a'\" is no number"),
        ("True", "no number"),
        ("x", "'x' is not of numbers"),
        ("__import__('os').system('true')", "is not of numbers"),
        ("().__class__.__bases__[0].__subclasses__()", "is not of numbers"),
        ("[x for x in 1]", "is not of numbers"),
        ("lambda: 1", "is not of numbers"),
        ("1 if 2 else 3", "is not of numbers"),
        ("1 << 99999999999", "is not of numbers"),
        ("~1", "is not of numbers"),
        ("1\x00", "no expression|null"),
        ("\u0661", "no number|no expression"),
        ("(" * 500 + "1" + ")" * 499, "no expression|nested"),
        ("1" * 1001, "more than 1000 characters"),
    ],
)
def test_anything_else_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        calculate(text)


@pytest.mark.parametrize("text", ["-" * 999 + "1", "1" + "+1" * 499, "1**" * 333 + "1"])
def test_an_expression_of_any_depth_is_a_value_or_an_error(text):
    try:
        value = calculate(text)
    except ValueError as error:
        value = str(error)
    assert value in ("-1", "500", "1", "the expression is nested too deeply")


def test_the_largest_numbers():
    assert len(calculate("2**10000")) == 3011
    assert calculate(f"1/2**{calculator.MAX_BITS}").startswith("1/1995")
