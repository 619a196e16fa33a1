"""``functionalize``: in-place calls on memory that nobody else sees become functional ones."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op, Value
from moec.passes.aliases import AliasSets
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.calls import is_call
from moec.passes.effects import written_operands
from moec.passes.registry import register_pass
from moec.passes.twins import functional_ops

_REPEATS = ("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default", "aten.as_strided.default")
"""Views through which a write may not be a write to each element once."""


@register_pass
@dataclass(frozen=True)
class Functionalize(Pass):
    """Turns in-place ATen calls into functional ones where that cannot be seen.

    ``%y = aten.div_.Tensor(%x, %s)`` becomes ``aten.div.Tensor``, and every later use of ``%x`` uses the new value.
    Done when the call writes to its first argument only, has a functional twin (same name without the underscore,
    same overload, same arguments), and the value written to was made by an op of this graph in memory of its own:
    no argument, constant or view of one, and nothing else that shares its memory is used after the write. A result
    that type promotion would widen is cast back, as the in-place call does. Everything else stays, with a remark.
    """

    name = "functionalize"
    pass_class = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        stats = {"functionalized": 0, "left": 0}
        for nested in [graph, *(r for op in graph.walk() for r in op.regions)]:
            self._run_on(nested, ctx, stats)
        return PassResult(stats["functionalized"] > 0, stats)

    def _run_on(self, graph: Graph, ctx: PassContext, stats: dict[str, int]) -> None:
        ops = list(graph.ops)
        position = {op: i for i, op in enumerate(ops)}
        aliases = AliasSets(graph)
        for i, op in enumerate(ops):
            if not _is_in_place(op):
                aliases.add(op)
                continue
            new = _why_not(op, aliases, position) or functional_ops(op)
            if isinstance(new, str):
                stats["left"] += 1
                ctx.remark("missed", self.name, f"{op.attrs['target']} stays in place: {new}", op)
                aliases.add(op)
                continue
            if not ctx.take_fuel(self.name, op.attrs["target"], op):
                for made in reversed(new):
                    made.drop_operands()
                return
            ctx.remark("applied", self.name, f"{op.attrs['target']} became functional", op)
            stats["functionalized"] += 1
            for made in new:
                graph.insert_before(op, made)
                position[made] = i
                aliases.add(made)
            _retarget(op, new[-1].result, position)


def _retarget(op: Op, fresh: Value, position: dict[Op, int]) -> None:
    """Let ``fresh`` stand for the written value from here on, and erase the in-place call."""
    base = op.operands[0]
    fresh.name = op.result.name
    for user, index in list(base.uses):
        if position[user] > position[op]:
            user.set_operand(index, fresh)
    op.result.replace_all_uses_with(fresh)
    op.erase()


def _is_in_place(op: Op) -> bool:
    """True for calls of an ``OpOverload`` that write to an operand and give it back."""
    if op.name != "torch.call" or op.attrs["target"].startswith(("py.", "hop.")):
        return False
    return bool(written_operands(op))


def _why_not(op: Op, aliases: AliasSets, position: dict[Op, int]) -> str | None:
    """The reason why the memory written to may be seen otherwise, or None."""
    args = op.attrs.get("args", ())
    if written_operands(op) != {0} or not args or args[0] != Operand(0) or len(op.results) != 1:
        return "it writes to more than its first argument"
    base = op.operands[0]
    if aliases.is_outside(base):
        return f"{base!r} may lie in memory from outside the graph"
    for other in aliases.of(base):
        if is_call(other.op, *_REPEATS):
            return f"{other!r} may hold one element in several places, or lie anywhere in its memory"
        if other is base:
            continue
        if other in op.operands:
            return f"{other!r}, another operand, may share its memory"
        if any(position[user] > position[op] for user in other.users):
            return f"{other!r} may share its memory and is used later"
    return None
