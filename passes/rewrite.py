"""The rewrite engine: match, check, rewrite; with remarks, fuel and a fixed point.

A rewrite keeps no state between its three methods: ``pattern`` finds, ``check`` says why not, ``rewrite`` changes the
graph through the :class:`Rewriter`. A match that ``check`` refuses becomes a "missed" remark with the reason, a
rewrite that happened an "applied" one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from moec.ir.attributes import freeze
from moec.ir.core import Graph, Location, Op, Value
from moec.ir.errors import MoecError
from moec.ir.opdef import op_def
from moec.ir.types import Type
from moec.passes.base import PassContext, PassResult
from moec.passes.calls import call_op

M = TypeVar("M")

REWRITES_PER_OP = 32
"""More rewrites than this for every op of the graph mean that two rewrites undo each other."""


class Rewriter:
    """The only way in which a rewrite changes the graph. New ops stand before ``anchor``, the op that matched."""

    def __init__(self, anchor: Op) -> None:
        self.anchor = anchor
        self.new_ops: list[Op] = []
        self.touched: list[Op] = []

    @property
    def graph(self) -> Graph:
        """The graph that holds the anchor.

        Raises:
            MoecError: The anchor has been erased.
        """
        if self.anchor.parent is None:
            raise MoecError(f"the anchor {self.anchor!r} is gone; insert before erasing it")
        return self.anchor.parent

    def insert(self, op: Op, before: Op | None = None) -> Op:
        """Put ``op`` before ``before`` (the anchor); it inherits the anchor's location if it has none."""
        if op.loc == Location():
            op.loc = self.anchor.loc
        place = before or self.anchor
        if place.parent is None:
            raise MoecError(f"cannot insert before {place!r}: it is in no graph")
        place.parent.insert_before(place, op)
        self.new_ops.append(op)
        return op

    def op(
        self,
        name: str,
        operands: Sequence[Value] = (),
        *,
        attrs: Mapping[str, Any] | None = None,
        result_types: Sequence[Type] | None = None,
        regions: Sequence[Graph] = (),
        groups: Sequence[int] | None = None,
        loc: Location | None = None,
        names: Sequence[str] = (),
        before: Op | None = None,
    ) -> Op:
        """Make and insert an op. Without ``result_types`` its definition infers them.

        Raises:
            MoecError: The result types are neither given nor inferable.
        """
        types = result_types
        if types is None:
            probe = Op(name, operands, (), attrs=attrs, regions=regions, groups=groups)
            types = op_def(name).infer(probe)
            probe.drop_operands()
            if types is None:
                raise MoecError(f"{name}: result types cannot be inferred", hint="pass result_types")
        made = Op(name, operands, types, attrs=attrs, regions=regions, groups=groups, loc=loc, names=names)
        return self.insert(made, before)

    def call(
        self,
        target: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        result_types: Sequence[Type],
        before: Op | None = None,
    ) -> Op:
        """Make and insert a ``torch.call``; values inside ``args`` and ``kwargs`` become its operands."""
        return self.insert(call_op(target, args, kwargs or {}, result_types), before)

    def replace(self, op: Op, values: Sequence[Value]) -> None:
        """Let ``values`` stand for the results of ``op``, and erase it."""
        if len(values) != len(op.results):
            raise MoecError(f"{op.name} has {len(op.results)} results, {len(values)} values were given for them")
        for old, new in zip(op.results, values, strict=True):
            self.touched += old.users
            if not new.name:
                new.name = old.name
            old.replace_all_uses_with(new)
        self.erase(op)

    def erase(self, op: Op) -> None:
        """Erase an op whose results nobody uses; what made its operands is looked at again."""
        self.touched += [v.op for v in op.operands if v.op is not None]
        op.erase()

    def set_attr(self, op: Op, name: str, value: Any) -> None:
        """Change an attribute in place."""
        op.attrs[name] = freeze(value)
        self.touched.append(op)

    def erase_unused(self, op: Op | None) -> None:
        """Erase ``op`` and, in turn, its makers, as far as they are pure and unused."""
        from moec.passes.dce import erase_unused  # torch is needed only where calls are looked at

        if op is not None:
            erase_unused(op, self.erase)


class Rewrite(Generic[M]):
    """One named, small rewrite. Its docstring says why it is safe.

    Attributes:
        name: Shown in remarks, statistics and fuel.
    """

    name: ClassVar[str]

    def pattern(self, op: Op) -> M | None:
        """The match rooted at ``op``, or None. Changes nothing."""
        raise NotImplementedError

    def check(self, match: M) -> str | None:
        """None if the rewrite may happen, else the reason why not. Changes nothing."""
        return None

    def rewrite(self, match: M, rewriter: Rewriter) -> None:
        """Change the graph."""
        raise NotImplementedError


def apply_rewrites(
    graph: Graph,
    rewrites: Sequence[Rewrite[Any]],
    ctx: PassContext,
    pass_name: str,
    *,
    recursive: bool = True,
    remark_applied: bool = True,
) -> PassResult:
    """Apply ``rewrites`` to ``graph`` (and its nested graphs) until none applies or the fuel is spent.

    Ops are visited in program order, rewrites in the order given; after a rewrite its new ops, the users of what it
    replaced, and the makers of what it dropped are visited again.

    Args:
        graph: Rewritten in place.
        rewrites: Tried in order at every op.
        ctx: Takes the remarks and holds the fuel.
        pass_name: In whose name remarks are made.
        recursive: Visit nested graphs too.
        remark_applied: False where the rewrites are too many and too small to be told one by one.

    Returns:
        ``modified``, and how often each rewrite was applied.

    Raises:
        MoecError: The rewrites do not come to rest.
    """
    first = list(graph.walk() if recursive else graph.ops)
    limit = REWRITES_PER_OP * len(first) + REWRITES_PER_OP
    work, queued = deque(first), set(first)
    stats: dict[str, int] = {}
    refused: dict[tuple[Op, str], str] = {}
    while work:
        op = work.popleft()
        queued.discard(op)
        if not is_live(op, graph):
            continue
        for rule in rewrites:
            match = rule.pattern(op)
            if match is None:
                continue
            reason = rule.check(match)
            if reason is not None:
                refused[op, rule.name] = reason
                continue
            refused.pop((op, rule.name), None)
            if not ctx.take_fuel(pass_name, rule.name, op):
                work.clear()
                break
            if remark_applied:
                ctx.remark("applied", pass_name, rule.name, op)
            rewriter = Rewriter(op)
            rule.rewrite(match, rewriter)
            stats[rule.name] = stats.get(rule.name, 0) + 1
            if sum(stats.values()) > limit:
                raise MoecError(
                    f"pass {pass_name!r}: rewrites do not come to rest after {limit} steps; the last was {rule.name!r}",
                    hint=f"two of these undo each other: {', '.join(stats)}",
                )
            for again in (*rewriter.new_ops, op, *rewriter.touched):
                if again not in queued:
                    queued.add(again)
                    work.append(again)
            break
    for (op, name), reason in refused.items():
        if is_live(op, graph):
            ctx.remark("missed", pass_name, f"{name}: {reason}", op)
    return PassResult(bool(stats), stats)


def is_live(op: Op, root: Graph) -> bool:
    """True if ``op`` is still part of ``root`` or of a graph nested in it."""
    at: Op | None = op
    while at is not None:
        if at.parent is None:
            return False
        if at.parent is root:
            return True
        at = at.parent.parent_op
    return False
