"""Dimension expressions: precedence, order, torch's functions, and the limits."""

from __future__ import annotations

from typing import NoReturn

import pytest
import sympy
from torch.utils._sympy import functions as tf

from moec.ir.exprs import functions, parse_expr, print_expr, symbol

S, T = symbol("S"), symbol("T")


def fail(pos: int, message: str) -> NoReturn:
    raise ValueError(f"{pos}: {message}")


def read(text: str) -> sympy.Basic:
    expr, end = parse_expr(text, 0, fail)
    assert end == len(text)
    return expr


@pytest.mark.parametrize(
    ("text", "expr", "printed"),
    [
        ("T*2 + 1", 2 * T + 1, "2*T + 1"),
        ("1 - T", 1 - T, "-T + 1"),
        ("2*(T + 1)", 2 * T + 2, "2*T + 2"),
        ("S*T*2**3", 8 * S * T, "8*S*T"),
        ("-T**2", -(T**2), "-T**2"),
        ("(-T)**3", (-T) ** 3, "-T**3"),
        ("2**3**2", sympy.Integer(512), "512"),
        ("T//4//2", tf.FloorDiv(tf.FloorDiv(T, 4, evaluate=False), 2, evaluate=False), "(T//4)//2"),
        ("8*(T//4)", 8 * tf.FloorDiv(T, 4), "8*(T//4)"),
        ("8*T//4", tf.FloorDiv(8 * T, 4, evaluate=False), "(8*T)//4"),
        ("-T//4", tf.FloorDiv(-T, 4, evaluate=False), "(-T)//4"),
        ("-(T//4)", -tf.FloorDiv(T, 4), "-(T//4)"),
        ("T % 4", tf.PythonMod(T, 4), "T % 4"),
        ("T%4*2", 2 * tf.PythonMod(T, 4), "2*(T % 4)"),
        ("-7//2", sympy.Integer(-4), "-4"),
        ("-7 % 4", sympy.Integer(1), "1"),
        ("1/2*T", T / 2, "1/2*T"),
        ("T - -3", T + 3, "T + 3"),
        ("S - T - 1", S - T - 1, "S - T - 1"),
        ("S < T + 1", sympy.Lt(S, T + 1), "S < T + 1"),
        ("S == T", sympy.Eq(S, T), "S == T"),
        ('$"a b" + 1', symbol("a b") + 1, '$"a b" + 1'),
        ("1.5*zf0", 1.5 * symbol("zf0"), "1.5*zf0"),
        ("Max(4, 3)", sympy.Integer(4), "4"),
    ],
)
def test_meaning_and_text(text: str, expr: sympy.Basic, printed: str) -> None:
    found = read(text)
    assert found == expr
    assert print_expr(found) == printed
    assert read(printed) == expr


def test_unary_minus_over_floor_division() -> None:
    """Python reads ``-7//2`` as ``(-7)//2``; so does the parser, with symbols as with numbers."""
    assert read("-T//2").subs(T, 7) == -4
    assert read("-(T//2)").subs(T, 7) == -3


@pytest.mark.parametrize("name", sorted(set(functions()) - {"And", "Or", "Not", "Where"}))
def test_every_function_comes_back(name: str) -> None:
    cls = functions()[name]
    for count in (1, 2, 3, 4):
        try:
            expr = cls(*[symbol(n) for n in "abcd"[:count]], evaluate=False)
        except TypeError:  # another number of arguments
            continue
        assert read(print_expr(expr)) == expr


def test_numbers_that_sympy_leaves_in_a_minimum_are_read_as_they_are_printed() -> None:
    left = tf.Min(
        sympy.Symbol("s0", integer=True), tf.Max(sympy.Integer(2), sympy.Integer(3), evaluate=False), evaluate=False
    )
    assert print_expr(left) == print_expr(read(print_expr(left))) == "Min(3, s0)"


def test_text_does_not_depend_on_assumptions() -> None:
    loose = [sympy.Symbol(n, integer=True) for n in ("b", "a", "c")]
    tight = [sympy.Symbol("b", integer=True, positive=True), sympy.Symbol("a"), sympy.Symbol("c", integer=True)]
    texts = {print_expr(tf.Max(x * y + z, z, evaluate=False) + x - 4) for x, y, z in (loose, tight)}
    assert texts == {"Max(a*b + c, c) + b - 4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os')", "0: unknown function '__import__'"),
        ("T.args", ""),
        ("lambda: 1", ""),
        ("2**2**2**2**2**2", "too large|out of range"),
        ("LShift(1, 2) + ", "15: expected a dimension"),
        ("0**-1", "division by zero"),
        ("x" + "+x" * 3000, "longer than 4000 tokens"),
        ("Max()", "is -oo, not a number"),
        ("1e400", "out of range"),
        ('$"\\q"', "malformed escape"),
    ],
)
def test_refused(text: str, message: str) -> None:
    if not message:  # the expression ends before the foreign text; what follows is the caller's to refuse
        _, end = parse_expr(text, 0, fail)
        assert end < len(text)
        return
    with pytest.raises(ValueError, match=message):
        read(text)


def test_nothing_large_is_computed() -> None:
    assert print_expr(read("LShift(9, 1000000000000)")) == "LShift(9, 1000000000000)"
    assert print_expr(read("PowByNatural(9, 1000000000000)")) == "PowByNatural(9, 1000000000000)"
