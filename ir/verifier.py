"""Checks that a graph keeps the rules of the IR, and that every op keeps the contract of its definition.

1. Every value is an argument of its graph or a result of an op before its use; nested graphs use only their own.
2. Lists of uses are exact; results and arguments know their owner and index; an op stands in one place.
3. A graph ends in its only ``return``.
4. Operand groups, attributes, nested graphs and results are as the definition declares.
5. The definition's own ``verify`` holds, and the result types are those that ``infer`` gives.
6. Types and attributes have a text form, so that a verified graph can be printed and read back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn, TypeVar

import sympy

from moec.ir.core import Graph, Op, Value
from moec.ir.errors import IRError, MoecError, VerifyError, nearest
from moec.ir.lexer import MAX_NESTING
from moec.ir.opdef import OpDef, all_op_defs, find_op_def
from moec.ir.printer import graph_lines, print_attr_of, print_op, print_type
from moec.ir.types import DType, TensorType, Type

_CONTEXT = 3  # lines shown before and after a faulty op
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "dtype": (DType,),
}
_T = TypeVar("_T")


def verify(graph: Graph) -> None:
    """Check ``graph`` and everything in it.

    Raises:
        VerifyError: The first violation, with the op's text, its graph, and the line of the user's model.
    """
    _Verifier(graph).graph(graph, 0)


class _Verifier:
    def __init__(self, root: Graph) -> None:
        self.root = root

    def error(self, message: str, graph: Graph, op: Op | None, hint: str | None) -> VerifyError:
        where = f" (nested in {graph.parent_op.name})" if graph.parent_op is not None else ""
        text, excerpt = _show(self.root, op)
        error = VerifyError(
            f"graph @{graph.name}{where}: {message}",
            op=text,
            source=(op.loc.source or None) if op is not None else None,
            hint=hint,
        )
        error.excerpt = excerpt
        return error

    def fail(self, message: str, graph: Graph, op: Op | None = None, hint: str | None = None) -> NoReturn:
        raise self.error(message, graph, op, hint)

    # --- one graph ---

    def graph(self, graph: Graph, depth: int) -> None:
        if depth > MAX_NESTING:
            self.fail(f"graphs are nested more than {MAX_NESTING} deep", self.root)
        uses: dict[Value, list[tuple[Op, int]]] = {}
        for i, arg in enumerate(graph.args):
            if arg in uses:
                self.fail(f"argument {i} ({arg!r}) is listed twice", graph)
            self.owned(graph, arg, graph, i, None)
            uses[arg] = []
        seen: set[Op] = set()
        for op in graph.ops:
            if op in seen:
                self.fail(f"{op.name} stands in the graph twice", graph, op)
            if op.parent is not graph:
                self.fail(f"{op.name} says that it belongs to another graph", graph, op)
            seen.add(op)
            self.uses(graph, op, uses)
            self.op(graph, op, depth)
            for i, result in enumerate(op.results):
                if result in uses:
                    self.fail(f"result {i} ({result!r}) is defined twice", graph, op)
                self.owned(graph, result, op, i, op)
                uses[result] = []
        self.terminator(graph)
        self.use_lists(graph, uses)

    def owned(self, graph: Graph, value: Value, owner: Op | Graph, index: int, op: Op | None) -> None:
        if value.owner is not owner or value.index != index:
            self.fail(f"{value!r} does not know its owner or its place ({index})", graph, op)
        if not isinstance(value.type, Type):
            self.fail(f"{value!r} has no IR type but a {type(value.type).__name__}", graph, op)
        self.guard(graph, op, f"type of {value!r}", lambda: print_type(value.type))

    def uses(self, graph: Graph, op: Op, uses: dict[Value, list[tuple[Op, int]]]) -> None:
        for i, value in enumerate(op.operands):
            if value not in uses:
                home = value.owner.parent if isinstance(value.owner, Op) else value.owner
                if value.owner is op:
                    self.fail(f"{op.name} uses its own result {value!r}", graph, op)
                if home is graph and (not isinstance(value.owner, Op) or value.owner in graph.ops):
                    self.fail(f"{value!r} is used before its definition", graph, op)
                owner = f"graph @{home.name}" if isinstance(home, Graph) else "no graph"
                hint = "nested graphs are closed: pass the value in as an argument"
                self.fail(f"{op.name} uses {value!r}, which belongs to {owner}", graph, op, hint)
            uses[value].append((op, i))

    def use_lists(self, graph: Graph, uses: dict[Value, list[tuple[Op, int]]]) -> None:
        for value, expected in uses.items():
            if len(value.uses) != len(expected) or set(value.uses) != set(expected):
                extra = [u for u in value.uses if u not in expected]
                what = f"a use by {extra[0][0].name} that is not in the graph" if extra else "not all of its uses"
                self.fail(f"the use list of {value!r} holds {what}", graph, value.op)

    def terminator(self, graph: Graph) -> None:
        if not graph.ops or graph.ops[-1].name != "return":
            self.fail("does not end in return", graph, graph.ops[-1] if graph.ops else None)
        for op in graph.ops[:-1]:
            if op.name == "return":
                self.fail("return stands before the end", graph, op)
        if graph.attrs:
            self.guard(graph, None, "attributes of the graph", lambda: print_attr_of(None, "", graph.attrs))

    # --- one op ---

    def op(self, graph: Graph, op: Op, depth: int) -> None:
        definition = find_op_def(op.name)
        if definition is None:
            self.fail(f"unknown op {op.name!r}; {nearest(op.name, all_op_defs())}", graph, op)
        self.groups(graph, op, definition)
        self.attributes(graph, op, definition)
        self.regions(graph, op, definition)
        if not definition.variadic_results and len(op.results) != len(definition.results):
            names = ", ".join(definition.results) or "none"
            want = f"{len(definition.results)} ({names})"
            self.fail(f"{op.name} has {len(op.results)} results, its definition {want}", graph, op)
        for region in op.regions:
            if region.parent_op is not op:
                self.fail(f"nested graph @{region.name} says that it belongs to another op", graph, op)
            self.graph(region, depth + 1)
        self.guard(graph, op, "definition's check", lambda: definition.verify(op))
        inferred = self.guard(graph, op, "definition's inference", lambda: definition.infer(op))
        if inferred is not None:
            self.result_types(graph, op, list(inferred))

    def groups(self, graph: Graph, op: Op, definition: OpDef) -> None:
        declared = definition.operands
        if sum(op.groups) != len(op.operands) or any(n < 0 for n in op.groups):
            self.fail(f"operand groups {op.groups} do not add up to {len(op.operands)} operands", graph, op)
        if len(op.groups) != len(declared):
            names = ", ".join(o.name for o in declared)
            want = f"{len(declared)} ({names})"
            self.fail(f"{op.name} has {len(op.groups)} operand groups, its definition {want}", graph, op)
        for size, group in zip(op.groups, declared, strict=True):
            if group.arity == "one" and size != 1:
                self.fail(f"{op.name} takes one {group.name!r}, not {size}", graph, op)
            if group.arity == "optional" and size > 1:
                self.fail(f"{op.name} takes at most one {group.name!r}, not {size}", graph, op)

    def attributes(self, graph: Graph, op: Op, definition: OpDef) -> None:
        declared = {a.name: a for a in definition.attrs}
        for name in op.attrs:
            if name not in declared:
                self.fail(f"{op.name} has no attribute {name!r}; {nearest(str(name), declared)}", graph, op)
        for spec in definition.attrs:
            if spec.name not in op.attrs:
                if spec.required:
                    self.fail(f"{op.name} is missing its attribute {spec.name!r} ({spec.doc})", graph, op)
                continue
            value = op.attrs[spec.name]
            kinds = _KINDS.get(spec.kind)
            if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and spec.kind != "bool")):
                got = type(value).__name__
                self.fail(f"{op.name}: attribute {spec.name!r} must be a {spec.kind}, not {got}", graph, op)
            if spec.choices and value not in spec.choices:
                known = nearest(str(value), spec.choices)
                self.fail(f"{op.name}: attribute {spec.name!r} cannot be {value!r}; {known}", graph, op)
            self.guard(graph, op, f"attribute {spec.name!r}", partial(print_attr_of, definition, spec.name, value))

    def regions(self, graph: Graph, op: Op, definition: OpDef) -> None:
        least = sum(not r.optional for r in definition.regions)
        most = None if definition.variadic_results and definition.regions else len(definition.regions)
        if len(op.regions) < least or (most is not None and len(op.regions) > most):
            span = str(least) if most == least else f"{least} to {most}"
            self.fail(f"{op.name} has {len(op.regions)} nested graphs, its definition {span}", graph, op)

    def result_types(self, graph: Graph, op: Op, inferred: list[Type]) -> None:
        if len(inferred) != len(op.results):
            self.fail(f"{op.name} has {len(op.results)} results, inference gives {len(inferred)}", graph, op)
        for result, want in zip(op.results, inferred, strict=True):
            if not same_type(result.type, want):
                have = print_type(result.type)
                self.fail(f"{op.name}: result {result!r} is {have}, its operands make it {print_type(want)}", graph, op)

    def guard(self, graph: Graph, op: Op | None, what: str, check: Callable[[], _T]) -> _T:
        """``check()``; whatever it raises becomes a VerifyError at ``op``."""
        try:
            return check()
        except MoecError as e:
            raise self.error(e.message, graph, op, e.hint) from e
        except Exception as e:  # a definition may come from a third party, and its op may be malformed in any way
            raise self.error(f"the {what} failed: {type(e).__name__}: {e}", graph, op, None) from e


def same_type(a: Type, b: Type) -> bool:
    """Equal types; dimensions may differ in form and in what sympy assumes about their symbols."""
    if a == b:
        return True
    if isinstance(a, TensorType) and isinstance(b, TensorType):
        head_a, head_b = (a.dtype, a.device, a.rank), (b.dtype, b.device, b.rank)
        return head_a == head_b and all(map(same_dim, a.shape, b.shape))
    return print_type(a) == print_type(b)


def same_dim(a: sympy.Expr, b: sympy.Expr) -> bool:
    """True if two dimensions are the same polynomial in symbols of the same names."""
    if a == b:
        return True
    plain = [e.xreplace({s: sympy.Symbol(s.name, integer=True) for s in e.free_symbols}) for e in (a, b)]
    return bool(plain[0] == plain[1] or sympy.expand(plain[0] - plain[1]) == 0)


def _show(root: Graph, op: Op | None) -> tuple[str | None, str]:
    """The op's text, and a few lines of the graph around it with a mark under the op's name."""
    try:
        text = print_op(op).split("\n", 1)[0] if op is not None else None
        lines, spot = graph_lines(root, op)
    except (IRError, AttributeError, TypeError):  # the graph is too broken to be printed
        return (repr(op) if op is not None else None), ""
    if spot is None or op is None:
        return text, ""
    row, column = spot
    first, last = max(0, row - _CONTEXT), min(len(lines), row + _CONTEXT + 1)
    shown = [f"    {line}" for line in lines[first:last]]
    shown.insert(row - first + 1, "    " + " " * column + "^" * len(op.name))
    if first:
        shown.insert(0, f"    {lines[0]}")
        if first > 1:
            shown.insert(1, "      ...")
    return text, "\n".join(shown)
