"""Dimension expressions as text: printing sympy expressions and reading them back without ever evaluating text.

The text is Python's arithmetic with ``+ - * / // % **``, one comparison, and calls of the functions with which torch
describes sizes (``torch.utils._sympy.functions``). ``//`` is torch's ``FloorDiv`` and ``%`` its ``PythonMod``.
Functions are rebuilt as written, without sympy's simplifier: torch has simplified them before they were printed, and
the simplifier can be slow on hostile text. Sums, products and powers take sympy's normal form, so ``T*2`` is ``2*T``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import NoReturn

import sympy

from moec.ir.errors import IRError, nearest

MAX_DEPTH = 60
MAX_TOKENS = 4000
MAX_DIGITS = 1000
MAX_POWER_BITS = 4096
MAX_EXPONENT = 1024

Fail = Callable[[int, str], NoReturn]

_RELATION, _SUM, _PRODUCT, _UNARY, _POWER, _ATOM = range(6)
_BINARY = {
    "<": _RELATION, "<=": _RELATION, ">=": _RELATION, "==": _RELATION, "!=": _RELATION,
    "+": _SUM, "-": _SUM, "*": _PRODUCT, "/": _PRODUCT, "//": _PRODUCT, "%": _PRODUCT, "**": _POWER,
}  # fmt: skip
_RELATIONS: dict[str, type[sympy.Basic]] = {
    "<": sympy.StrictLessThan,
    "<=": sympy.LessThan,
    ">=": sympy.GreaterThan,
    "==": sympy.Equality,
    "!=": sympy.Unequality,
}
_TOKEN = re.compile(
    r"""[ \t\r\n]*+(?:
    (?P<number>\d++(?:\.\d*+)?+(?:[eE][+-]?\d++)?)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*+)
    |(?P<quoted>\$"(?:[^"\\\n]|\\[^\n])*+")
    |(?P<op>\*\*|//|<=|>=|==|!=|[-+*/%()<,])
    )?""",
    re.VERBOSE | re.ASCII,
)
_IDENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_KEYWORDS = frozenset({"true", "false"})


@cache
def functions() -> Mapping[str, type[sympy.Basic]]:
    """The functions that an expression may call, by name."""
    import torch.utils._sympy.functions as torch_functions  # slow to import, needed only where a function is met

    base = sympy.core.function.Application
    table: dict[str, type[sympy.Basic]] = {"And": sympy.And, "Or": sympy.Or, "Not": sympy.Not}
    for name in ("Abs", "floor", "ceiling"):
        table[name] = getattr(sympy, name)
    found = {n: v for n, v in vars(torch_functions).items() if isinstance(v, type) and issubclass(v, base)}
    table.update({n: v for n, v in found.items() if v is not base})
    return table


@lru_cache(maxsize=4096)
def symbol(name: str) -> sympy.Symbol:
    """The symbol of that name: an integer, or a real number for torch's float symbols ``zf0``."""
    return sympy.Symbol(name, real=True) if name.startswith("zf") else sympy.Symbol(name, integer=True)


# --- printing ---------------------------------------------------------------------------------------------------


def print_expr(expr: sympy.Basic | int) -> str:
    """``expr`` as text, in an order that depends on names alone, never on sympy's assumptions.

    Raises:
        IRError: The expression holds something that the text form cannot say.
    """
    if isinstance(expr, int):
        return _digits(expr)
    return _print(expr, 0)[0]


def _digits(value: int) -> str:
    if value.bit_length() > 3 * MAX_DIGITS:
        raise IRError(f"an integer of {value.bit_length()} bits is too long for the text form")
    return str(value)


@lru_cache(maxsize=8192)
def _print(expr: sympy.Basic, depth: int) -> tuple[str, int]:
    """Text and precedence."""
    if depth > MAX_DEPTH:
        raise IRError(f"a dimension expression is nested more than {MAX_DEPTH} deep")
    if isinstance(expr, sympy.Symbol):
        plain = _IDENT.fullmatch(expr.name) and expr.name not in _KEYWORDS
        return (expr.name if plain else f"${json.dumps(expr.name)}"), _ATOM
    if isinstance(expr, sympy.Rational):
        top = _digits(int(expr.p))
        if expr.q == 1:
            return top, _SUM if expr.p < 0 else _ATOM
        return f"{top}/{_digits(int(expr.q))}", _SUM if expr.p < 0 else _PRODUCT
    if isinstance(expr, sympy.Float):
        return repr(float(expr)), _SUM if expr.is_negative else _ATOM
    if isinstance(expr, sympy.logic.boolalg.BooleanAtom):
        return ("true" if expr == sympy.true else "false"), _ATOM
    if isinstance(expr, sympy.Add):
        return _print_sum(expr, depth), _SUM
    if isinstance(expr, sympy.Mul):
        return _print_product(expr, depth)
    if isinstance(expr, sympy.Pow):
        return f"{_wrap(expr.base, _ATOM, depth)}**{_wrap(expr.exp, _ATOM, depth)}", _POWER
    return _print_call(expr, depth)


def _wrap(expr: sympy.Basic, least: int, depth: int) -> str:
    text, level = _print(expr, depth + 1)
    return text if level >= least else f"({text})"


def _print_sum(expr: sympy.Add, depth: int) -> str:
    constants = [a for a in expr.args if a.is_Number]
    terms = sorted(_wrap(a, _SUM, depth) for a in expr.args if not a.is_Number)
    terms.sort(key=lambda t: t.startswith("-"))
    terms += [_wrap(c, _SUM, depth) for c in constants]
    text = terms[0]
    for term in terms[1:]:
        text += f" - {term[1:]}" if term.startswith("-") else f" + {term}"
    return text


def _print_product(expr: sympy.Mul, depth: int) -> tuple[str, int]:
    coefficient, rest = expr.as_coeff_Mul()
    if isinstance(rest, sympy.Add) and coefficient != 1:  # sympy's own normal form is the distributed one
        return _print_sum(sympy.Add(*[coefficient * a for a in rest.args]), depth), _SUM
    factors = sorted(_wrap(f, _POWER, depth) for f in sympy.Mul.make_args(rest))
    text = "*".join(factors)
    if coefficient == 1:
        return text, _PRODUCT
    if coefficient == -1:
        return f"-{text}", _SUM
    head, _ = _print(coefficient, depth + 1)
    return f"{head}*{text}", _SUM if head.startswith("-") else _PRODUCT


def _print_call(expr: sympy.Basic, depth: int) -> tuple[str, int]:
    name = type(expr).__name__
    if isinstance(expr, sympy.core.relational.Relational):
        left, right, sign = expr.lhs, expr.rhs, expr.rel_op
        if sign in (">", ">="):  # a bare ">" closes a type
            left, right, sign = right, left, sign.replace(">", "<")
        return f"{_wrap(left, _SUM, depth)} {sign} {_wrap(right, _SUM, depth)}", _RELATION
    if name in ("FloorDiv", "PythonMod") and len(expr.args) == 2:
        left, right = (_wrap(a, _POWER, depth) for a in expr.args)
        return (f"{left}//{right}" if name == "FloorDiv" else f"{left} % {right}"), _PRODUCT
    if functions().get(name) is not type(expr) and name not in ("Max", "Min"):
        raise IRError(f"no text form for the {name} in the dimension expression {expr}")
    args = [_print(a, depth + 1)[0] for a in expr.args]
    if name in ("Max", "Min") and all(a.lstrip("-").isdigit() for a in args):
        # sympy leaves Max(2, 3) inside Min(s0, Max(2, 3)), which it makes of Max(2, Min(s0, 3)); the parser does not.
        value = (max if name == "Max" else min)(map(int, args))
        return str(value), _SUM if value < 0 else _ATOM
    if name in ("Max", "Min", "And", "Or"):  # sympy orders these by assumptions
        args.sort()
    return f"{name}({', '.join(args)})", _ATOM


# --- parsing ----------------------------------------------------------------------------------------------------


def parse_expr(text: str, pos: int, fail: Fail) -> tuple[sympy.Basic, int]:
    """Read one expression of ``text`` from ``pos`` on.

    Args:
        text: The whole text.
        pos: Where the expression starts.
        fail: Called with a position and a message on malformed text; raises.

    Returns:
        The expression and the position behind its last token.
    """
    reader = _Reader(text, pos, fail)
    expr = reader.expression(_RELATION, 0)
    return expr, reader.last_end


class _Reader:
    """A Pratt parser with one token of look-ahead, bounded in depth and length."""

    def __init__(self, text: str, pos: int, fail: Fail) -> None:
        self.text, self.fail = text, fail
        self.end = self.last_end = pos
        self.count = 0
        self.next()

    def next(self) -> None:
        self.last_end = self.end
        m = _TOKEN.match(self.text, self.end)
        assert m is not None  # every part of the pattern is optional
        self.kind = m.lastgroup or ""
        if self.kind:
            self.value, self.start, self.end = m[self.kind], m.start(self.kind), m.end()
        else:
            self.value, self.start = "", m.end()
        self.count += 1
        if self.count > MAX_TOKENS:
            self.fail(self.start, f"dimension expression longer than {MAX_TOKENS} tokens")

    def expression(self, least: int, depth: int) -> sympy.Basic:
        """The longest expression from here whose operators bind at least as tightly as ``least``."""
        if depth > MAX_DEPTH:
            self.fail(self.start, f"dimension expression nested more than {MAX_DEPTH} deep")
        left = [self.prefix(depth)]  # several: the operands of an n-ary sum or product that has not been built yet
        chain, chain_at = "", 0
        while self.kind == "op":
            sign, at = self.value, self.start
            level = _BINARY.get(sign, -1)
            if level < least:
                break
            self.next()
            # ** binds to the right, and its right side may carry a sign
            right = self.expression(_UNARY if sign == "**" else level + 1, depth + 1)
            if sign == "-":
                right = self.build(at, "neg", [right])
            joins = "+" if sign in ("+", "-") else "*" if sign == "*" else ""
            if chain and chain != joins:
                left = [self.build(chain_at, chain, left)]
            if joins:  # sums and products are built at once: adding one by one takes quadratic time
                chain, chain_at = joins, at
                left.append(right)
            else:
                chain = ""
                left = [self.build(at, sign, [left[0], right])]
            if level == _RELATION and self.kind == "op" and _BINARY.get(self.value) == _RELATION:
                self.fail(self.start, "comparisons do not chain")
        return self.build(chain_at, chain, left) if chain else left[0]

    def prefix(self, depth: int) -> sympy.Basic:
        kind, value, at = self.kind, self.value, self.start
        if kind == "op" and value in ("-", "+"):
            self.next()
            inner = self.expression(_UNARY, depth + 1)
            return self.build(at, "neg", [inner]) if value == "-" else inner
        if kind == "op" and value == "(":
            self.next()
            inner = self.expression(_RELATION, depth + 1)
            self.close()
            return inner
        if kind == "number":
            self.next()
            return self.number(value, at)
        if kind == "quoted":
            self.next()
            return self.quoted(value, at)
        if kind == "name":
            self.next()
            if self.kind == "op" and self.value == "(":
                return self.call(value, at, depth)
            if value in _KEYWORDS:
                return sympy.true if value == "true" else sympy.false
            return symbol(value)
        found = repr(self.text[at : at + 1]) if at < len(self.text) else "the end of the text"
        return self.fail(at, f"expected a dimension, found {found if kind != 'op' else repr(value)}")

    def close(self) -> None:
        if self.kind != "op" or self.value != ")":
            self.fail(self.start, "expected ')' in a dimension expression")
        self.next()

    def number(self, value: str, at: int) -> sympy.Basic:
        if len(value) > MAX_DIGITS:
            self.fail(at, f"number of more than {MAX_DIGITS} digits")
        if value.isdigit():
            return sympy.Integer(int(value))
        if float(value) == float("inf"):
            self.fail(at, f"number {value} is out of range")
        return sympy.Float(float(value))

    def quoted(self, value: str, at: int) -> sympy.Basic:
        try:
            name = json.loads(value[1:])
        except ValueError:
            self.fail(at, "malformed escape in a quoted symbol")
        return symbol(name)

    def call(self, name: str, at: int, depth: int) -> sympy.Basic:
        if name not in functions():
            known = nearest(name[:40], functions())
            self.fail(at, f"unknown function {name[:40]!r} in a dimension expression; {known}")
        self.next()
        args: list[sympy.Basic] = []
        while not (self.kind == "op" and self.value == ")"):
            if args:
                if self.kind != "op" or self.value != ",":
                    self.fail(self.start, f"expected ',' or ')' in the arguments of {name}")
                self.next()
            args.append(self.expression(_RELATION, depth + 1))
        self.next()
        return self.build(at, name, args)

    def build(self, at: int, name: str, args: list[sympy.Basic]) -> sympy.Basic:
        """Make the node; sympy's complaints become errors of the text."""
        try:
            result = _node(name, args)
        except (ValueError, TypeError, ArithmeticError, AttributeError, NotImplementedError, AssertionError) as e:
            self.fail(at, f"malformed dimension expression: {str(e)[:200] or type(e).__name__}")
        except RecursionError:
            self.fail(at, "dimension expression too deep for sympy")
        if result in _FORBIDDEN:
            self.fail(at, f"the dimension expression is {result}, not a number")
        return result


_FORBIDDEN = (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)


def _node(name: str, args: list[sympy.Basic]) -> sympy.Basic:
    """The sympy node ``name(args)``, for operators and functions.

    Raises:
        ValueError, TypeError, ...: sympy refuses the arguments, or the result would be absurdly large.
    """
    if name in ("+", "*", "/", "**", "neg", "//", "%"):
        if not all(isinstance(a, sympy.Expr) for a in args):
            raise TypeError("a truth value has no arithmetic")
        match name:
            case "+":
                return sympy.Add(*args)
            case "*":
                return sympy.Mul(*args)
            case "neg":
                return sympy.Mul(-1, *args)
            case "/":
                return sympy.Mul(args[0], _power(args[1], sympy.Integer(-1)))
            case "**":
                return _power(*args)
        name = "FloorDiv" if name == "//" else "PythonMod"
    if name in _RELATIONS:
        return _RELATIONS[name](*args, evaluate=False)
    safe = name in ("FloorDiv", "PythonMod", "Max", "Min") and all(a.is_Integer for a in args)
    return functions()[name](*args, evaluate=safe)


def _power(base: sympy.Basic, exponent: sympy.Basic) -> sympy.Basic:
    if not (isinstance(exponent, sympy.Integer) and isinstance(base, sympy.Expr)):
        return sympy.Pow(base, exponent, evaluate=False)
    if exponent.is_negative and base.is_zero:
        raise ZeroDivisionError("division by zero")
    times = abs(int(exponent))
    coefficient = base.as_coeff_Mul()[0]
    if times > MAX_EXPONENT:
        raise ValueError(f"exponent {str(times)[:20]} is out of range")
    if isinstance(coefficient, sympy.Rational):
        bits = max(int(coefficient.p).bit_length(), int(coefficient.q).bit_length())
        if bits * times > MAX_POWER_BITS:
            raise ValueError("power too large")
    return sympy.Pow(base, exponent)
