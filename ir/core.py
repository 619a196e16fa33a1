"""Values, ops and graphs: a small SSA with several results per op, one block per graph, and nested graphs.

The order of ``Graph.ops`` is the order of execution; ops with effects keep it. Nested graphs are closed: what they
use comes in through their arguments, never from the graph around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moec.ir.attributes import freeze
from moec.ir.errors import IRError
from moec.ir.types import Type


@dataclass(frozen=True)
class Location:
    """Where an op came from.

    Attributes:
        module: Dotted path of the nn.Module (``model.layers.0.mlp``), or "".
        source: ``file.py:123: the line`` of the user's model, or "".
        stack: The whole Python stack trace as torch recorded it, or "".
    """

    module: str = ""
    source: str = ""
    stack: str = ""


class Value:
    """One SSA value: an argument of a graph or a result of an op. ``uses`` lists (op, operand index) pairs."""

    __slots__ = ("index", "meta", "name", "owner", "type", "uses")

    def __init__(self, type: Type, owner: Op | Graph, index: int, name: str = "") -> None:
        self.type = type
        self.owner = owner
        self.index = index
        self.name = name
        self.uses: list[tuple[Op, int]] = []
        self.meta: dict[str, Any] = {}

    @property
    def op(self) -> Op | None:
        """The op that makes this value, or None for a graph argument."""
        return self.owner if isinstance(self.owner, Op) else None

    @property
    def users(self) -> list[Op]:
        """The ops that use this value, each once, in no particular order."""
        return list(dict.fromkeys(op for op, _ in self.uses))

    def replace_all_uses_with(self, other: Value) -> None:
        """Make every user of this value use ``other``."""
        if other is self:
            return
        for op, i in list(self.uses):
            op.set_operand(i, other)

    def __repr__(self) -> str:
        return f"%{self.name or '?'}"


class Op:
    """One operation.

    Attributes:
        name: ``dialect.op``, the key into the op registry.
        operands: Flat tuple of values. ``groups`` gives the size of each named operand group of the op's definition;
            when not given, the only group of changing size takes what the others leave.
        attrs: Attributes by name (see ``moec.ir.attributes``).
        regions: Nested closed graphs.
        results: Values made by this op.
        loc: Where it came from.
        meta: Data that is carried but never printed, compared or relied on (fx ``meta`` of the captured node).
    """

    __slots__ = ("_operands", "attrs", "groups", "loc", "meta", "name", "parent", "regions", "results")

    def __init__(
        self,
        name: str,
        operands: Sequence[Value] = (),
        result_types: Sequence[Type] = (),
        *,
        attrs: Mapping[str, Any] | None = None,
        regions: Sequence[Graph] = (),
        groups: Sequence[int] | None = None,
        loc: Location | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._operands: tuple[Value, ...] = tuple(operands)
        if groups is None:
            from moec.ir.opdef import default_groups  # the registry needs Op's type; looked up when called

            groups = default_groups(name, len(self._operands))
        self.groups: tuple[int, ...] = tuple(groups)
        if sum(self.groups) != len(self._operands):
            raise IRError(f"{name}: operand groups {self.groups} do not add up to {len(self._operands)} operands")
        self.attrs: dict[str, Any] = {k: freeze(v) for k, v in (attrs or {}).items()}
        self.regions: list[Graph] = list(regions)
        self.results = [Value(t, self, i, names[i] if i < len(names) else "") for i, t in enumerate(result_types)]
        self.loc = loc or Location()
        self.meta: dict[str, Any] = {}
        self.parent: Graph | None = None
        for i, v in enumerate(self._operands):
            v.uses.append((self, i))
        for r in self.regions:
            r.parent_op = self

    @property
    def operands(self) -> tuple[Value, ...]:
        return self._operands

    @property
    def dialect(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def result(self) -> Value:
        """The only result.

        Raises:
            IRError: The op has none or several.
        """
        if len(self.results) != 1:
            raise IRError(f"{self.name} has {len(self.results)} results, not one")
        return self.results[0]

    def set_operand(self, index: int, value: Value) -> None:
        old = self._operands[index]
        old.uses.remove((self, index))
        value.uses.append((self, index))
        self._operands = (*self._operands[:index], value, *self._operands[index + 1 :])

    def group(self, name: str) -> tuple[Value, ...]:
        """The operands of the group called ``name`` in the op's definition (one, none, or any number)."""
        from moec.ir.opdef import op_def  # the registry needs Op's type; looked up when called

        position = op_def(self.name).group_index(name)
        start = sum(self.groups[:position])
        return self._operands[start : start + self.groups[position]] if position < len(self.groups) else ()

    def operand(self, name: str) -> Value | None:
        """The single or optional operand called ``name``; None where an optional one is absent."""
        values = self.group(name)
        if len(values) > 1:
            raise IRError(f"{self.name}: operand group {name!r} holds {len(values)} values")
        return values[0] if values else None

    def drop_operands(self) -> None:
        """Forget all operands (before the op is thrown away)."""
        for i, v in enumerate(self._operands):
            v.uses.remove((self, i))
        self._operands = ()
        self.groups = ()

    def erase(self) -> None:
        """Remove this op from its graph.

        Raises:
            IRError: A result is still used.
        """
        for r in self.results:
            if r.uses:
                raise IRError(f"cannot erase {self.name}: result {r!r} is used by {r.uses[0][0].name}")
        if self.parent is not None:
            self.parent.ops.remove(self)
            self.parent = None
        self.drop_operands()

    def __repr__(self) -> str:
        return f"<{self.name} {', '.join(map(repr, self.operands))}>"


@dataclass(eq=False)
class Graph:
    """A named list of ops with arguments. The last op is ``return``; its operands are the graph's outputs."""

    name: str = "main"
    args: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    parent_op: Op | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def add_arg(self, type: Type, name: str = "") -> Value:
        value = Value(type, self, len(self.args), name)
        self.args.append(value)
        return value

    def append(self, op: Op) -> Op:
        return self.insert(len(self.ops), op)

    def insert(self, index: int, op: Op) -> Op:
        if op.parent is not None:
            raise IRError(f"{op.name} is already part of graph @{op.parent.name}")
        op.parent = self
        self.ops.insert(index, op)
        return op

    def insert_before(self, anchor: Op, op: Op) -> Op:
        return self.insert(self.ops.index(anchor), op)

    def insert_after(self, anchor: Op, op: Op) -> Op:
        return self.insert(self.ops.index(anchor) + 1, op)

    @property
    def terminator(self) -> Op:
        """The closing ``return``.

        Raises:
            IRError: The graph does not end in one.
        """
        if not self.ops or self.ops[-1].name != "return":
            raise IRError(f"graph @{self.name} does not end in return")
        return self.ops[-1]

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.terminator.operands

    def walk(self) -> Iterator[Op]:
        """All ops, nested graphs included, outer before inner."""
        for op in list(self.ops):
            yield op
            for region in op.regions:
                yield from region.walk()

    def erase_many(self, ops: Iterable[Op]) -> None:
        """Remove several ops at once, users before makers, in one sweep over the list."""
        gone = set(ops)
        for op in reversed(self.ops):
            if op in gone:
                op.drop_operands()
        for op in gone:
            for r in op.results:
                if r.uses:
                    raise IRError(f"cannot erase {op.name}: result {r!r} is used by {r.uses[0][0].name}")
            op.parent = None
        self.ops = [op for op in self.ops if op not in gone]

    def clone(self, name: str | None = None) -> Graph:
        """A deep copy; values, ops and nested graphs are new, types and attributes are shared."""
        copy = Graph(name or self.name, attrs=dict(self.attrs), meta=dict(self.meta))
        env: dict[Value, Value] = {}
        for a in self.args:
            env[a] = copy.add_arg(a.type, a.name)
            env[a].meta = dict(a.meta)
        for op in self.ops:
            copy.append(clone_op(op, env.__getitem__, env))
        return copy

    def __str__(self) -> str:
        from moec.ir.printer import print_graph  # the printer knows graphs; a graph knows it only to show itself

        return print_graph(self)


def clone_op(op: Op, lookup: Callable[[Value], Value], env: dict[Value, Value]) -> Op:
    """A copy of ``op`` on the operands that ``lookup`` gives; its results are entered into ``env``."""
    new = Op(
        op.name,
        [lookup(v) for v in op.operands],
        [r.type for r in op.results],
        attrs=op.attrs,
        regions=[r.clone() for r in op.regions],
        groups=op.groups,
        loc=op.loc,
        names=[r.name for r in op.results],
    )
    new.meta = dict(op.meta)
    for old, fresh in zip(op.results, new.results, strict=True):
        fresh.meta = dict(old.meta)
        env[old] = fresh
    return new
