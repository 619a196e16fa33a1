"""Text to graphs. The inverse of ``moec.ir.printer``.

The parser checks the form: known ops, attributes and types, operand groups, values defined before use. What the text
*means* is checked by ``moec.ir.verifier``. Any input either parses or raises an :class:`IRError`; recursion is bounded.

    file      := graph*
    graph     := "graph" "@" name signature "{" op* "}"
    signature := "(" [%arg ":" type, ...] ")" ["->" types] ["attrs" dict]
    op        := [%result, ... "="] name operands [dict] [region, ...] [":" type, ...]
    region    := "{" ["@" name] signature "{" op* "}" "}"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op, Value
from moec.ir.errors import IRError, nearest
from moec.ir.lexer import CLIP, MAX_NESTING, Lexer, clip
from moec.ir.opdef import OpDef, OperandDef, all_op_defs, find_op_def
from moec.ir.parse_atoms import parse_attr, parse_dict, parse_key, parse_type
from moec.ir.printer import print_type
from moec.ir.types import Type


def parse(text: str, filename: str = "<text>") -> list[Graph]:
    """Read all graphs of ``text``.

    Args:
        text: IR text.
        filename: Named in error messages.

    Raises:
        ParseError: Malformed text, with line, column and a caret.
    """
    return _Parser(Lexer(text, filename)).file()


def parse_graph(text: str, filename: str = "<text>") -> Graph:
    """Read ``text``, which holds exactly one graph.

    Raises:
        ParseError: Malformed text.
        IRError: No graph, or several.
    """
    graphs = parse(text, filename)
    if len(graphs) != 1:
        raise IRError(f"{filename}: expected exactly one graph, found {len(graphs)}")
    return graphs[0]


@dataclass
class _Scope:
    """The values of one graph by name, with the position of their definition."""

    graph: Graph
    outer: _Scope | None
    values: dict[str, tuple[Value, int]]


class _Parser:
    def __init__(self, lx: Lexer) -> None:
        self.lx = lx

    # --- graphs ---

    def file(self) -> list[Graph]:
        lx = self.lx
        graphs: list[Graph] = []
        names: set[str] = set()
        while lx.kind:
            if lx.kind != "name" or lx.text != "graph":
                lx.fail(f"expected 'graph', found {lx.found()}")
            lx.advance()
            at = lx.start
            name = self.symbol("graph's name")
            if name in names:
                lx.fail(f"graph @{name[:CLIP]} is defined twice", at)
            names.add(name)
            graphs.append(self.graph(name, None, 0))
        return graphs

    def symbol(self, what: str) -> str:
        """``@name`` or ``@"any text"``."""
        lx = self.lx
        if lx.kind == "at":
            name = lx.text[1:]
            lx.advance()
            return name
        if lx.accept("@") and lx.kind == "string":
            return lx.string()
        raise lx.error(f"expected a {what} ('@name'), found {lx.found()}")

    def graph(self, name: str, outer: _Scope | None, depth: int) -> Graph:
        """A graph from its argument list on."""
        lx = self.lx
        if depth > MAX_NESTING:
            lx.fail(f"graphs nested more than {MAX_NESTING} deep")
        graph = Graph(name)
        scope = _Scope(graph, outer, {})
        lx.expect("(", "before the graph's arguments")
        while not lx.is_punct(")"):
            at = lx.start
            arg = self.value_name("an argument")
            lx.expect(":", f"after argument %{arg[:CLIP]}")
            self.define(scope, graph.add_arg(parse_type(lx), arg), at)
            if not lx.accept(",") and not lx.is_punct(")"):
                lx.fail(f"expected ',' or ')' after an argument, found {lx.found()}")
        lx.advance()
        declares = lx.accept("->")
        header_at = lx.start
        header = self.header_types() if declares else None
        if lx.kind == "name" and lx.text == "attrs":
            lx.advance()
            graph.attrs = parse_dict(lx)
        lx.expect("{", "before the graph's ops")
        while not lx.is_punct("}"):
            if not lx.kind:
                lx.fail(f"graph @{name[:CLIP]} is not closed: expected an op or '}}', found the end of the text")
            graph.append(self.op(scope, depth))
        lx.advance()
        if header is not None:
            self.check_header(graph, header, header_at)
        return graph

    def header_types(self) -> list[Type]:
        lx = self.lx
        if not lx.accept("("):
            return [parse_type(lx)]
        types: list[Type] = []
        while not lx.is_punct(")"):
            types.append(parse_type(lx))
            if not lx.accept(",") and not lx.is_punct(")"):
                lx.fail(f"expected ',' or ')' after a result type, found {lx.found()}")
        lx.advance()
        return types

    def check_header(self, graph: Graph, header: list[Type], at: int) -> None:
        if not graph.ops or graph.ops[-1].name != "return":
            self.lx.fail(f"graph @{graph.name[:CLIP]} declares its results but does not end in return", at)
        given = [v.type for v in graph.ops[-1].operands]
        if given != header:
            want, have = (", ".join(map(print_type, ts)) or "nothing" for ts in (header, given))
            if want != have:
                self.lx.fail(f"graph @{graph.name[:CLIP]} declares the results {want}, but returns {have}", at)

    # --- values ---

    def value_name(self, what: str) -> str:
        lx = self.lx
        if lx.kind != "value":
            lx.fail(f"expected {what} ('%name'), found {lx.found()}")
        name = lx.text[1:]
        lx.advance()
        return name

    def define(self, scope: _Scope, value: Value, at: int) -> None:
        old = scope.values.get(value.name)
        if old is not None:
            line = self.lx.source.count("\n", 0, old[1]) + 1
            self.lx.fail(f"value %{value.name[:CLIP]} is defined twice; first in line {line}", at)
        scope.values[value.name] = (value, at)

    def use(self, scope: _Scope) -> Value:
        at = self.lx.start
        name = self.value_name("a value")
        found = scope.values.get(name)
        if found is not None:
            return found[0]
        message = f"value %{name[:CLIP]} is not defined"
        outer = scope.outer
        while outer is not None:
            if name in outer.values:
                self.lx.fail(f"{message} in this nested graph; it is closed, so pass the value in as an argument", at)
            outer = outer.outer
        known = list(scope.values)[-50:]
        raise self.lx.error(f"{message} here; {nearest(name[:CLIP], known) if known else 'no value is'}", at)

    # --- ops ---

    def op(self, scope: _Scope, depth: int) -> Op:
        lx = self.lx
        results: list[tuple[str, int]] = []
        if lx.kind == "value":
            while True:
                at = lx.start
                results.append((self.value_name("a result"), at))
                if not lx.accept(","):
                    break
            lx.expect("=", "after an op's results")
        at = lx.start
        if lx.kind != "name":
            lx.fail(f"expected an op's name, found {lx.found()}")
        name = lx.text
        definition = find_op_def(name)
        if definition is None:
            lx.fail(f"unknown op {clip(name)}; {nearest(name[:CLIP], all_op_defs())}")
        lx.advance()
        operands, groups, attrs = self.operands(scope, definition)
        regions: list[Graph] = []
        if lx.is_punct("{") and not self.at_region():
            self.attributes(definition, attrs)
        if lx.is_punct("{"):
            regions = self.regions(scope, definition, depth)
        required = sum(not r.optional for r in definition.regions)
        if len(regions) < required:
            missing = definition.regions[len(regions)].name
            lx.fail(f"{name} is missing its nested graph {missing!r}", at)
        types: list[Type] = []
        if lx.accept(":"):
            types.append(parse_type(lx))
            while lx.accept(","):
                types.append(parse_type(lx))
        if len(types) != len(results):
            lx.fail(f"{name} has {len(results)} results but {len(types)} result types", at)
        op = Op(name, operands, types, attrs=attrs, regions=regions, groups=groups, names=[n for n, _ in results])
        for value, (_, where) in zip(op.results, results, strict=True):
            self.define(scope, value, where)
        return op

    def operands(self, scope: _Scope, definition: OpDef) -> tuple[list[Value], list[int], dict[str, Any]]:
        """Operands, group sizes, and the attributes that the operands' text says."""
        lx = self.lx
        if definition.name == "torch.call" and (lx.kind == "at" or lx.is_punct("@")):
            return self.call(scope)
        if definition.name == "return" and lx.kind == "name" and lx.text == "template":
            lx.advance()
            values: list[Value] = []
            template = parse_attr(lx, lambda _: self.place(scope, values))
            return values, [len(values)], {"template": template}
        if definition.name == "return":
            values = [self.use(scope)] if lx.kind == "value" and not self.defines() else []
            while values and lx.accept(","):
                values.append(self.use(scope))
            return values, [len(values)], {}
        return (*self.grouped(scope, definition), {})

    def defines(self) -> bool:
        """True if the value at the current token is being defined: ``%x =`` or ``%x, %y =``."""
        lx = self.lx
        here = lx.start
        while lx.kind == "value":
            lx.advance()
            if not lx.accept(","):
                break
        found = lx.is_punct("=")
        lx.seek(here)
        return found

    def place(self, scope: _Scope, values: list[Value]) -> Operand:
        values.append(self.use(scope))
        return Operand(len(values) - 1)

    def call(self, scope: _Scope) -> tuple[list[Value], list[int], dict[str, Any]]:
        """``@target(arg, ..., key = arg, ...)``."""
        lx = self.lx
        values: list[Value] = []
        attrs: dict[str, Any] = {"target": self.symbol("target")}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        on_value = lambda _: self.place(scope, values)  # noqa: E731
        lx.expect("(", "before the call's arguments")
        while not lx.is_punct(")"):
            at = lx.start
            if lx.kind in ("name", "string") and self.keyed():
                key = parse_key(lx)
                if key in kwargs:
                    lx.fail(f"argument {clip(key)} is given twice", at)
                lx.advance()
                kwargs[key] = parse_attr(lx, on_value, 1)
            elif kwargs:
                lx.fail("a positional argument after a named one")
            else:
                args.append(parse_attr(lx, on_value, 1))
            if not lx.accept(",") and not lx.is_punct(")"):
                lx.fail(f"expected ',' or ')' after an argument, found {lx.found()}")
        lx.advance()
        attrs["args"] = tuple(args)
        if kwargs:
            attrs["kwargs"] = kwargs
        return values, [len(values)], attrs

    def keyed(self) -> bool:
        """True if ``=`` follows the current token."""
        lx = self.lx
        here = lx.start
        lx.advance()
        found = lx.is_punct("=")
        lx.seek(here)
        return found

    def grouped(self, scope: _Scope, definition: OpDef) -> tuple[list[Value], list[int]]:
        """``%x, [%a, %b], bias = %c`` as the definition's groups say."""
        lx = self.lx
        values: list[Value] = []
        groups: list[int] = []
        comma = True  # nothing read yet, or a comma read that asks for more
        for group in definition.operands:
            before = len(values)
            if comma and self.starts(group):
                if group.arity == "optional":
                    lx.advance()
                    lx.expect("=", f"after {group.name}")
                if group.arity == "many":
                    lx.advance()
                    while not lx.is_punct("]"):
                        values.append(self.use(scope))
                        if not lx.accept(",") and not lx.is_punct("]"):
                            lx.fail(f"expected ',' or ']' in {group.name}, found {lx.found()}")
                    lx.advance()
                else:
                    values.append(self.use(scope))
                comma = lx.accept(",")
            elif group.arity == "one":
                want = ", ".join(_form(g) for g in definition.operands)
                lx.fail(f"{definition.name} is missing its operand {group.name!r}; it takes {want}")
            groups.append(len(values) - before)
        if comma and values:
            want = ", ".join(_form(g) for g in definition.operands)
            lx.fail(f"too many or wrong operands; {definition.name} takes {want}")
        return values, groups

    def starts(self, group: OperandDef) -> bool:
        lx = self.lx
        if group.arity == "many":
            return lx.is_punct("[")
        if group.arity == "optional":
            return lx.kind == "name" and lx.text == group.name and self.keyed()
        return lx.kind == "value" and not self.defines()

    def attributes(self, definition: OpDef, attrs: dict[str, Any]) -> None:
        """An op's ``{key = value, ...}`` into ``attrs``."""
        lx = self.lx
        specs = {a.name: a for a in definition.attrs}
        lx.expect("{")
        while not lx.is_punct("}"):
            at = lx.start
            key = parse_key(lx)
            if key not in specs:
                lx.fail(f"{definition.name} has no attribute {clip(key)}; {nearest(key[:CLIP], specs)}", at)
            if key in attrs:
                lx.fail(f"attribute {clip(key)} is given twice", at)
            lx.expect("=", f"after attribute {clip(key)}")
            at = lx.start
            value = parse_attr(lx)
            if specs[key].kind == "float" and type(value) is int:
                try:
                    value = float(value)
                except OverflowError:
                    lx.fail(f"attribute {clip(key)} is too large for a float", at)
            attrs[key] = value
            if not lx.accept(",") and not lx.is_punct("}"):
                lx.fail(f"expected ',' or '}}' after attribute {clip(key)}, found {lx.found()}")
        lx.advance()

    def at_region(self) -> bool:
        """True if the brace at the current token opens a nested graph, not attributes."""
        lx = self.lx
        here = lx.start
        lx.advance()
        found = lx.is_punct("(") or lx.kind == "at" or lx.is_punct("@")
        lx.seek(here)
        return found

    def regions(self, scope: _Scope, definition: OpDef, depth: int) -> list[Graph]:
        lx = self.lx
        regions: list[Graph] = []
        while True:
            at = lx.start
            lx.expect("{", "before a nested graph")
            name = "main" if lx.is_punct("(") else self.symbol("nested graph's name")
            if not definition.regions or (len(regions) == len(definition.regions) and not _any_number(definition)):
                lx.fail(f"{definition.name} takes {len(definition.regions)} nested graphs", at)
            regions.append(self.graph(name, scope, depth + 1))
            lx.expect("}", "after a nested graph")
            if not lx.accept(","):
                return regions


def _any_number(definition: OpDef) -> bool:
    return definition.name == "torch.call"


def _form(group: OperandDef) -> str:
    return {"one": f"%{group.name}", "many": f"[{group.name}...]", "optional": f"{group.name} = %..."}[group.arity]
