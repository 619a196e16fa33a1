"""Reading types and attribute values: the part of the parser below ops and graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import sympy

from moec.ir.attributes import ListAttr, Literal, Operand, Region
from moec.ir.errors import nearest
from moec.ir.exprs import parse_expr
from moec.ir.lexer import CLIP, MAX_NESTING, Lexer, clip
from moec.ir.types import DTYPES, NoneType, OpaqueType, PlanType, SymType, TensorType, TokenType, Type

_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "None": None, "inf": math.inf, "nan": math.nan}
_OPAQUE_TYPES = ("moe.plan", "comm.token", "torch.opaque")
_TYPE_NAMES = (*DTYPES, "sym_int", "sym_float", "sym_bool", "none")
_MAX_DIGITS = 1000
_SHAPES: dict[str, tuple[sympy.Expr, ...]] = {}
_MAX_SHAPES = 4096

OnValue = Callable[[Lexer], Any]


def parse_type(lx: Lexer) -> Type:
    """The type at the current token."""
    if lx.kind == "name":
        name = lx.text
        if name in DTYPES:
            at = lx.start
            lx.advance()
            if not lx.is_punct("["):
                lx.fail(f"element type {name!r} is no type of a value; a number is {name}[]", at)
            return _tensor(lx, name)
        if name == "none":
            lx.advance()
            return NoneType()
        if name in ("sym_int", "sym_float", "sym_bool"):
            lx.advance()
            if not lx.is_punct("<"):
                lx.expect("<", f"after {name}")
            return SymType(name[4:], _expr_between(lx, name == "sym_bool"))
        lx.fail(f"unknown type {clip(name)}; {nearest(name[:CLIP], _TYPE_NAMES)}")
    if lx.accept("!"):
        return _dialect_type(lx)
    raise lx.error(f"expected a type, found {lx.found()}")


def _tensor(lx: Lexer, name: str) -> TensorType:
    """The rest of a tensor type, from the ``[`` that is the current token."""
    close = lx.source.find("]", lx.end)
    key = lx.source[lx.end : close]
    shape = _SHAPES.get(key)
    if shape is not None:
        lx.seek(close + 1)
    else:
        shape = _shape(lx)
        if close == lx.last_end - 1:  # not for a quoted symbol with a bracket in it
            if len(_SHAPES) >= _MAX_SHAPES:
                _SHAPES.clear()
            _SHAPES[key] = shape
    return TensorType(DTYPES[name], shape, _device(lx) if lx.kind == "at" or lx.is_punct("@") else "cpu")


def _shape(lx: Lexer) -> tuple[sympy.Expr, ...]:
    def fail(pos: int, message: str) -> NoReturn:
        lx.fail(message, pos)

    dims: list[sympy.Expr] = []
    pos = _skip_space(lx.source, lx.end)
    while not lx.source.startswith("]", pos):
        if dims:
            if not lx.source.startswith(",", pos):
                lx.fail("expected ',' or ']' in a shape", pos)
            pos = _skip_space(lx.source, pos + 1)
        at = pos
        dim, pos = parse_expr(lx.source, pos, fail)
        if not isinstance(dim, sympy.Expr):
            lx.fail("a dimension is a number, not a truth value", at)
        dims.append(dim)
        pos = _skip_space(lx.source, pos)
    lx.seek(pos + 1)
    return tuple(dims)


def _skip_space(text: str, pos: int) -> int:
    while text[pos : pos + 1] in (" ", "\n", "\t", "\r"):
        pos += 1
    return pos


def _device(lx: Lexer) -> str:
    if lx.kind == "at":
        device = lx.text[1:]
        lx.advance()
        if lx.is_punct(":") and lx.source[lx.end : lx.end + 1].isdecimal():
            lx.advance()
            device += f":{integer(lx)}"
        return device
    lx.advance()
    if lx.kind != "string":
        lx.fail(f"expected a device after '@', found {lx.found()}")
    return lx.string()


def _expr_between(lx: Lexer, boolean: bool) -> sympy.Basic:
    """An expression from the ``<`` that is the current token to its ``>``."""

    def fail(pos: int, message: str) -> NoReturn:
        lx.fail(message, pos)

    at = lx.end
    expr, end = parse_expr(lx.source, lx.end, fail)
    if boolean != isinstance(expr, sympy.logic.boolalg.Boolean) and not isinstance(expr, sympy.Symbol):
        lx.fail("sym_bool holds a comparison, sym_int and sym_float a number", at)
    lx.seek(end)
    lx.expect(">", "behind an expression")
    return expr


def _dialect_type(lx: Lexer) -> Type:
    name = lx.text if lx.kind == "name" else ""
    if name not in _OPAQUE_TYPES:
        lx.fail(f"unknown type {clip('!' + name)}; {nearest('!' + name[:CLIP], ['!' + t for t in _OPAQUE_TYPES])}")
    lx.advance()
    if name == "comm.token":
        return TokenType()
    lx.expect("<", f"after !{name}")
    if name == "moe.plan":
        result: Type = PlanType(integer(lx))
    else:
        if lx.kind != "string":
            lx.fail(f"expected a string in !torch.opaque, found {lx.found()}")
        result = OpaqueType(lx.string())
    lx.expect(">", f"to close !{name}")
    return result


def integer(lx: Lexer) -> int:
    """A plain integer at the current token."""
    if lx.kind != "number" or not lx.text.isdigit():
        lx.fail(f"expected an integer, found {lx.found()}")
    value = number(lx, "")
    assert isinstance(value, int)
    return value


def number(lx: Lexer, sign: str) -> int | float:
    """The number at the current token."""
    text = lx.text
    if len(text) > _MAX_DIGITS:
        lx.fail(f"number of more than {_MAX_DIGITS} digits")
    if text.isdigit():
        lx.advance()
        return int(sign + text)
    value = float(sign + text)
    if math.isinf(value):
        lx.fail(f"number {clip(text)} is out of range")
    lx.advance()
    return value


def parse_attr(lx: Lexer, on_value: OnValue | None = None, depth: int = 0) -> Any:
    """The attribute value at the current token.

    Args:
        lx: The token stream.
        on_value: What to put in for a ``%value``; None where values may not stand.
        depth: Nesting so far.
    """
    if depth > MAX_NESTING:
        lx.fail(f"attribute nested more than {MAX_NESTING} deep")
    kind, text = lx.kind, lx.text
    if kind == "value" and on_value is not None:
        return on_value(lx)
    if kind == "number":
        return number(lx, "")
    if kind == "string":
        return lx.string()
    if kind == "name":
        return _named(lx)
    if kind == "punct":
        match text:
            case "-":
                return _negative(lx)
            case "(" | "[":
                return _sequence(lx, on_value, depth)
            case "{":
                return parse_dict(lx, on_value, depth)
            case "#":
                return _literal(lx)
            case "$":
                lx.advance()
                return Operand(integer(lx))
            case "@":
                lx.advance()
                return Region(integer(lx))
            case "!":
                return parse_type(lx)
    if kind == "value":
        lx.fail("a value cannot stand in an attribute; give it as an operand")
    raise lx.error(f"expected an attribute value, found {lx.found()}")


def _named(lx: Lexer) -> Any:
    name = lx.text
    if name in _CONSTANTS:
        lx.advance()
        return _CONSTANTS[name]
    if name in DTYPES:
        lx.advance()
        return _tensor(lx, name) if lx.is_punct("[") else DTYPES[name]
    if name in _TYPE_NAMES:
        return parse_type(lx)
    raise lx.error(f"unknown attribute value {clip(name)}; {nearest(name[:CLIP], [*_CONSTANTS, *_TYPE_NAMES])}")


def _negative(lx: Lexer) -> int | float:
    lx.advance()
    if lx.kind == "number":
        return number(lx, "-")
    if lx.kind == "name" and lx.text == "inf":
        lx.advance()
        return -math.inf
    raise lx.error(f"expected a number after '-', found {lx.found()}")


def _sequence(lx: Lexer, on_value: OnValue | None, depth: int) -> Any:
    close = ")" if lx.text == "(" else "]"
    lx.advance()
    items: list[Any] = []
    comma = False
    while not lx.is_punct(close):
        items.append(parse_attr(lx, on_value, depth + 1))
        comma = lx.accept(",")
        if not comma and not lx.is_punct(close):
            lx.fail(f"expected ',' or '{close}', found {lx.found()}")
    lx.advance()
    if close == "]":
        return ListAttr(tuple(items))
    if len(items) == 1 and not comma:
        return items[0]
    return tuple(items)


def parse_key(lx: Lexer) -> str:
    """An attribute's name: a plain or a quoted one."""
    if lx.kind == "string":
        return lx.string()
    if lx.kind != "name":
        lx.fail(f"expected an attribute's name, found {lx.found()}")
    key = lx.text
    lx.advance()
    return key


def parse_dict(lx: Lexer, on_value: OnValue | None = None, depth: int = 0) -> dict[str, Any]:
    """``{key = value, ...}`` from its opening brace."""
    lx.expect("{")
    entries: dict[str, Any] = {}
    while not lx.is_punct("}"):
        at = lx.start
        key = parse_key(lx)
        if key in entries:
            lx.fail(f"attribute {clip(key)} is given twice", at)
        lx.expect("=", f"after attribute {clip(key)}")
        entries[key] = parse_attr(lx, on_value, depth + 1)
        if not lx.accept(",") and not lx.is_punct("}"):
            lx.fail(f"expected ',' or '}}' after attribute {clip(key)}, found {lx.found()}")
    lx.advance()
    return entries


def _literal(lx: Lexer) -> Any:
    lx.advance()
    if lx.kind != "name":
        lx.fail(f"expected a literal's kind after '#', found {lx.found()}")
    kind = lx.text
    lx.advance()
    if not lx.is_punct("<"):
        lx.expect("<", f"after #{kind[:CLIP]}")
    if kind == "expr":
        return _expr_any(lx)
    lx.advance()
    if lx.kind != "string":
        lx.fail(f"expected a string in #{kind[:CLIP]}<...>, found {lx.found()}")
    text = lx.string()
    lx.expect(">", f"to close #{kind[:CLIP]}")
    return Literal(kind, text)


def _expr_any(lx: Lexer) -> sympy.Basic:
    def fail(pos: int, message: str) -> NoReturn:
        lx.fail(message, pos)

    expr, end = parse_expr(lx.source, lx.end, fail)
    lx.seek(end)
    lx.expect(">", "behind an expression")
    return expr
