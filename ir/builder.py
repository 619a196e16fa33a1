"""Building graphs from Python, one op at a time, at a movable place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moec.ir.attributes import ListAttr, Operand, Region
from moec.ir.core import Graph, Location, Op, Value
from moec.ir.errors import IRError, MoecError
from moec.ir.opdef import OpDef, op_def
from moec.ir.types import Type

OperandArg = Value | Sequence[Value] | None


class Builder:
    """Makes ops and puts them into a graph: at its end (before a closing ``return``), or around an op.

    Example::

        b = Builder(graph)
        rows, plan = b.op("moe.dispatch", x, ids, attrs={"experts": 8}).results
        h = b.op("moe.grouped_gemm", rows, [w13], plan).result
    """

    def __init__(self, graph: Graph, loc: Location | None = None) -> None:
        self.graph = graph
        self.loc = loc
        self._before: Op | None = None
        self._after: Op | None = None

    # --- where ---

    def insert_before(self, op: Op) -> Builder:
        """Put what follows before ``op``, in order."""
        self._check(op)
        self._before, self._after = op, None
        return self

    def insert_after(self, op: Op) -> Builder:
        """Put what follows behind ``op``, in order."""
        self._check(op)
        self._before, self._after = None, op
        return self

    def at_end(self) -> Builder:
        """Put what follows at the end of the graph, before its ``return`` if there is one."""
        self._before = self._after = None
        return self

    def _check(self, op: Op) -> None:
        if op.parent is not self.graph:
            raise IRError(f"{op.name} is not an op of graph @{self.graph.name}")

    def insert(self, op: Op) -> Op:
        """Put a finished op at the builder's place."""
        if self._before is not None:
            return self.graph.insert_before(self._before, op)
        if self._after is not None:
            self.graph.insert_after(self._after, op)
            self._after = op
            return op
        closed = bool(self.graph.ops) and self.graph.ops[-1].name == "return"
        return self.graph.insert(len(self.graph.ops) - closed, op)

    # --- what ---

    def op(
        self,
        name: str,
        *operands: OperandArg,
        attrs: Mapping[str, Any] | None = None,
        result_types: Sequence[Type] | None = None,
        regions: Sequence[Graph] = (),
        groups: Sequence[int] | None = None,
        loc: Location | None = None,
        names: Sequence[str] = (),
    ) -> Op:
        """Make op ``name`` and put it in place.

        Args:
            name: A registered op.
            operands: One entry per operand group of the definition: a value, a list of values for ``many``, None for
                an absent one; groups left out at the end are empty. With ``groups``, the flat values instead. An op
                whose only group is ``many`` takes its values as they are, too.
            attrs: Attributes.
            result_types: Types of the results; None infers them.
            regions: Nested graphs.
            groups: Sizes of the operand groups.
            loc: Where it came from; the builder's location if None.
            names: Name hints of the results.

        Raises:
            IRError: Unknown op, operands that fit no group, or types that cannot be inferred.
        """
        definition = op_def(name)
        if groups is None:
            values, groups = _grouped(definition, operands)
        else:
            values = [v for v in operands if isinstance(v, Value)]
            if len(values) != len(operands):
                raise IRError(f"{name}: with groups given, every operand is a single value")
        loc = loc or self.loc
        op = Op(name, values, result_types or (), attrs=attrs, regions=regions, groups=groups, loc=loc, names=names)
        if result_types is None and (definition.results or definition.variadic_results):
            op.results = [
                Value(t, op, i, names[i] if i < len(names) else "") for i, t in enumerate(_infer(definition, op))
            ]
        return self.insert(op)

    def call(
        self,
        target: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        result_types: Sequence[Type] = (),
        *,
        loc: Location | None = None,
        names: Sequence[str] = (),
    ) -> Op:
        """Make a ``torch.call``. Values and graphs anywhere in the arguments become operands and regions."""
        values: list[Value] = []
        regions: list[Graph] = []
        attrs: dict[str, Any] = {"target": target, "args": tuple(_template(a, values, regions) for a in args)}
        if kwargs:
            attrs["kwargs"] = {k: _template(v, values, regions) for k, v in kwargs.items()}
        op = Op(
            "torch.call", values, result_types, attrs=attrs, regions=regions, groups=(len(values),),
            loc=loc or self.loc, names=names,
        )  # fmt: skip
        return self.insert(op)

    def ret(self, *values: Value) -> Op:
        """Close the graph."""
        return self.graph.append(Op("return", values, groups=(len(values),), loc=self.loc))


def _grouped(definition: OpDef, operands: Sequence[OperandArg]) -> tuple[list[Value], list[int]]:
    declared = definition.operands
    if len(declared) == 1 and declared[0].arity == "many" and all(isinstance(o, Value) for o in operands):
        flat = [o for o in operands if isinstance(o, Value)]
        return flat, [len(flat)]
    if len(operands) > len(declared):
        names = ", ".join(o.name for o in declared)
        raise IRError(f"{definition.name} takes {len(declared)} operand groups ({names}), not {len(operands)}")
    values: list[Value] = []
    groups: list[int] = []
    for i, group in enumerate(declared):
        given = operands[i] if i < len(operands) else None
        members = [given] if isinstance(given, Value) else list(given or ())
        if (group.arity == "one" and len(members) != 1) or (group.arity == "optional" and len(members) > 1):
            raise IRError(f"{definition.name} takes {group.arity} {group.name!r}, not {len(members)}")
        values += members
        groups.append(len(members))
    return values, groups


def _infer(definition: OpDef, op: Op) -> Sequence[Type]:
    try:
        types = definition.infer(op)
    except MoecError:
        op.drop_operands()
        raise
    except (IndexError, KeyError, TypeError, AttributeError, ValueError) as e:
        text = repr(op)
        op.drop_operands()
        raise IRError(f"{definition.name}: cannot infer the result types: {type(e).__name__}: {e}", op=text) from e
    if types is None:
        op.drop_operands()
        raise IRError(f"{definition.name} cannot infer its result types; give result_types")
    return types


def _template(tree: Any, values: list[Value], regions: list[Graph]) -> Any:
    if isinstance(tree, Value):
        values.append(tree)
        return Operand(len(values) - 1)
    if isinstance(tree, Graph):
        regions.append(tree)
        return Region(len(regions) - 1)
    if isinstance(tree, list):
        return ListAttr(tuple(_template(v, values, regions) for v in tree))
    if isinstance(tree, ListAttr):
        return ListAttr(tuple(_template(v, values, regions) for v in tree.items))
    if isinstance(tree, tuple):
        return tuple(_template(v, values, regions) for v in tree)
    if isinstance(tree, dict):
        return {k: _template(v, values, regions) for k, v in tree.items()}
    return tree
