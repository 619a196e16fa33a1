"""Graphs as text. What is printed can be read back by ``moec.ir.parser`` without loss, locations and names aside.

Names of values are hints: the printer keeps them where they are unique and plain, and changes them where not. Nested
graphs have a naming scope of their own, so the text of a nested graph does not depend on what surrounds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy

from moec.ir.attributes import ListAttr, Literal, Operand, Region
from moec.ir.core import Graph, Op, Value
from moec.ir.errors import IRError
from moec.ir.exprs import print_expr
from moec.ir.lexer import MAX_NESTING, quote
from moec.ir.opdef import OpDef, find_op_def
from moec.ir.types import DType, NoneType, OpaqueType, PlanType, SymType, TensorType, TokenType, Type

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*", re.ASCII)
_DEVICE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?::(?:0|[1-9][0-9]*))?", re.ASCII)
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_]", re.ASCII)
_LONGEST_HINT = 120
_MAX_INT_BITS = 3300  # about 1000 digits, what the parser takes
_INDENT = "  "


# --- types and attributes -----------------------------------------------------------------------------------------


def print_type(t: Type) -> str:
    """``t`` as text.

    Raises:
        IRError: A type, or an expression in it, that the text form does not know.
    """
    match t:
        case TensorType():
            device = "" if t.device == "cpu" else f"@{t.device if _DEVICE.fullmatch(t.device) else quote(t.device)}"
            return f"{t.dtype.name}[{', '.join(map(print_expr, t.shape))}]{device}"
        case SymType():
            return f"sym_{t.kind}<{print_expr(t.expr)}>"
        case PlanType():
            return f"!moe.plan<{t.experts}>"
        case TokenType():
            return "!comm.token"
        case NoneType():
            return "none"
        case OpaqueType():
            return f"!torch.opaque<{quote(t.text)}>"
    raise IRError(f"no text form for the type {t!r}")


def _reference(operand: int) -> str:
    return f"${operand}"


def print_attr(value: Any, operand: Callable[[int], str] = _reference, depth: int = 0) -> str:
    """An attribute value as text; ``operand`` says what stands for the n-th operand.

    Raises:
        IRError: A value that is no attribute, or nested too deeply.
    """
    if depth > MAX_NESTING:
        raise IRError(f"an attribute is nested more than {MAX_NESTING} deep")
    match value:
        case None:
            return "None"
        case bool():
            return "true" if value else "false"
        case sympy.Basic():
            return f"#expr<{print_expr(value)}>"
        case int():
            if value.bit_length() > _MAX_INT_BITS:
                raise IRError(f"an integer attribute of {value.bit_length()} bits is too long for the text form")
            return int.__repr__(value)
        case float():
            return float.__repr__(value)
        case str():
            return quote(value)
        case DType():
            return value.name
        case Type():
            return print_type(value)
        case Operand():
            return operand(value.index)
        case Region():
            return f"@{value.index}"
        case Literal():
            if not _NAME.fullmatch(value.kind) or value.kind == "expr":
                raise IRError(f"the literal kind {value.kind!r} is not a plain name")
            return f"#{value.kind}<{quote(value.text)}>"
        case ListAttr():
            return f"[{', '.join(print_attr(v, operand, depth + 1) for v in value.items)}]"
        case tuple():
            inner = ", ".join(print_attr(v, operand, depth + 1) for v in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        case dict():
            return f"{{{', '.join(_entries(value, operand, depth + 1))}}}"
    raise IRError(f"{type(value).__name__} {value!r:.80} is not an attribute value")


def _entries(values: Mapping[Any, Any], operand: Callable[[int], str], depth: int) -> list[str]:
    entries = []
    for key, value in values.items():
        if not isinstance(key, str):
            raise IRError(f"the attribute key {key!r:.80} is not a string")
        entries.append(f"{key if _NAME.fullmatch(key) else quote(key)} = {print_attr(value, operand, depth)}")
    return entries


def print_attr_of(definition: OpDef | None, name: str, value: Any) -> str:
    """The attribute ``name`` as text; an integer where the definition wants a float is printed as one."""
    spec = next((a for a in definition.attrs if a.name == name), None) if definition is not None else None
    if type(value) is int and spec is not None and spec.kind == "float":
        try:
            value = float(value)
        except OverflowError:
            raise IRError(f"attribute {name!r} is too large for a float") from None
    return print_attr(value)


def effective_attrs(definition: OpDef | None, op: Op, skip: Sequence[str] = ()) -> dict[str, str]:
    """The text of every attribute of ``op`` that differs from its default, in the definition's order, then by age."""
    declared = {a.name: a for a in definition.attrs} if definition is not None else {}
    order = [n for n in declared if n in op.attrs] + [n for n in op.attrs if n not in declared]
    shown: dict[str, str] = {}
    for name in order:
        if name in skip:
            continue
        text = print_attr_of(definition, name, op.attrs[name])
        spec = declared.get(name)
        if spec is None or spec.required or text != print_attr_of(definition, name, spec.default):
            shown[name] = text
    return shown


# --- names --------------------------------------------------------------------------------------------------------


class Names:
    """Unique names of the values of one graph, given in the order of first sight."""

    def __init__(self) -> None:
        self._of: dict[Value, str] = {}
        self._used: set[str] = set()
        self._next: dict[str, int] = {}

    def __call__(self, value: Value) -> str:
        name = self._of.get(value)
        if name is None:
            name = self._of[value] = self._fresh(_NOT_PLAIN.sub("_", value.name[:_LONGEST_HINT]))
        return f"%{name}"

    def _fresh(self, hint: str) -> str:
        name, n = hint, self._next.get(hint, 0 if not hint else 1)
        while not name or name in self._used:
            name = f"{hint}_{n}" if hint else str(n)
            n += 1
        self._next[hint] = n
        self._used.add(name)
        return name


# --- ops and graphs -----------------------------------------------------------------------------------------------


def print_graph(graph: Graph) -> str:
    """``graph`` as text, ending in a newline.

    Raises:
        IRError: Something in it has no text form.
    """
    lines: list[str] = []
    _graph_lines(graph, f"graph {_symbol(graph.name)}", "", lines, 0)
    return "\n".join(lines) + "\n"


def print_op(op: Op, names: Names | None = None) -> str:
    """``op`` alone as text, nested graphs included, without indentation and final newline."""
    lines: list[str] = []
    _op_lines(op, names or Names(), "", lines, 0)
    return "\n".join(lines)


def graph_lines(graph: Graph, marked: Op | None = None) -> tuple[list[str], tuple[int, int] | None]:
    """The lines of ``graph``, and where the name of ``marked`` (an op of it or of a nested graph) stands.

    Returns:
        The lines, and (index of the line, column) or None, both from 0.
    """
    lines: list[str] = []
    spots: dict[Op, tuple[int, int]] = {}
    _graph_lines(graph, f"graph {_symbol(graph.name)}", "", lines, 0, spots)
    return lines, spots.get(marked) if marked is not None else None


def _symbol(name: str) -> str:
    return f"@{name if _DOTTED.fullmatch(name) else quote(name)}"


def _graph_lines(
    graph: Graph,
    head: str,
    indent: str,
    lines: list[str],
    depth: int,
    spots: dict[Op, tuple[int, int]] | None = None,
) -> None:
    """Append ``head(args) -> types {``, the body, and ``}``."""
    if depth > MAX_NESTING:
        raise IRError(f"graphs are nested more than {MAX_NESTING} deep")
    names = Names()
    text = f"{head}({', '.join(f'{names(a)}: {print_type(a.type)}' for a in graph.args)})"
    if graph.ops and graph.ops[-1].name == "return":
        types = [print_type(v.type) for v in graph.ops[-1].operands]
        text += f" -> {types[0] if len(types) == 1 else '(' + ', '.join(types) + ')'}"
    if graph.attrs:
        text += f" attrs {print_attr(graph.attrs)}"
    lines.append(f"{indent}{text} {{")
    for op in graph.ops:
        _op_lines(op, names, indent + _INDENT, lines, depth, spots)
    lines.append(f"{indent}}}")


def _op_lines(
    op: Op,
    names: Names,
    indent: str,
    lines: list[str],
    depth: int,
    spots: dict[Op, tuple[int, int]] | None = None,
) -> None:
    definition = find_op_def(op.name)
    operands, skip = _operands(op, definition, names)
    text = f"{op.name}{operands}"
    attrs = effective_attrs(definition, op, skip)
    if attrs:
        text += f" {{{', '.join(f'{k if _NAME.fullmatch(k) else quote(k)} = {v}' for k, v in attrs.items())}}}"
    head = f"{', '.join(map(names, op.results))} = " if op.results else ""
    text = head + text
    if spots is not None:
        spots[op] = (len(lines), len(indent) + len(head))
    types = f" : {', '.join(print_type(r.type) for r in op.results)}" if op.results else ""
    if not op.regions:
        lines.append(f"{indent}{text}{types}")
        return
    lines.append(f"{indent}{text} {{")
    for i, region in enumerate(op.regions):
        head = "" if region.name == "main" else _symbol(region.name)
        _graph_lines(region, head, indent + _INDENT, lines, depth + 1, spots)
        lines.append(f"{indent}}}, {{" if i + 1 < len(op.regions) else f"{indent}}}{types}")


def _operands(op: Op, definition: OpDef | None, names: Names) -> tuple[str, Sequence[str]]:
    """The text between the op's name and its attributes, and the attributes that it says already."""
    if op.name == "torch.call" and _in_order(op, ("args", "kwargs")) and _plain_call(op):
        place = lambda i: names(op.operands[i])  # noqa: E731
        parts = [print_attr(a, place, 1) for a in op.attrs.get("args", ())]
        parts += _entries(op.attrs.get("kwargs", {}), place, 1)
        return f" {_symbol(op.attrs['target'])}({', '.join(parts)})", ("target", "args", "kwargs")
    if op.name == "return":
        template = op.attrs.get("template")
        if template is not None and _in_order(op, ("template",)):
            return f" template {print_attr(template, lambda i: names(op.operands[i]))}", ("template",)
        return " " * bool(op.operands) + ", ".join(map(names, op.operands)), ()
    return _grouped_operands(op, definition, names), ()


def _grouped_operands(op: Op, definition: OpDef | None, names: Names) -> str:
    parts: list[str] = []
    start = 0
    kinds = definition.operands if definition is not None and len(definition.operands) == len(op.groups) else None
    for i, size in enumerate(op.groups):
        values = [names(v) for v in op.operands[start : start + size]]
        start += size
        arity = kinds[i].arity if kinds else "one"
        if arity == "one" and size == 1:
            parts.append(values[0])
        elif kinds and arity == "optional" and size <= 1:
            parts += [f"{kinds[i].name} = {v}" for v in values]
        elif size or any(op.groups[i + 1 :]):
            parts.append(f"[{', '.join(values)}]")
    return (" " if parts else "") + ", ".join(parts)


def _in_order(op: Op, attrs: Sequence[str]) -> bool:
    """True if the templates name the operands 0, 1, 2, ... each once and in order, as the parser would number them."""
    seen: list[int] = []
    stack = [op.attrs.get(a) for a in reversed(attrs)]
    while stack:
        match stack.pop():
            case Operand(index=i):
                seen.append(i)
            case ListAttr(items=items):
                stack.extend(reversed(items))
            case tuple() as items:
                stack.extend(reversed(items))
            case dict() as items:
                stack.extend(reversed(list(items.values())))
    return seen == list(range(len(op.operands)))


def _plain_call(op: Op) -> bool:
    kwargs = op.attrs.get("kwargs", {})
    return (
        isinstance(op.attrs.get("target"), str)
        and isinstance(op.attrs.get("args", ()), tuple)
        and isinstance(kwargs, dict)
        and all(isinstance(k, str) for k in kwargs)
    )
