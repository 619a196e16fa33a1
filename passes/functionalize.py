"""``functionalize``: in-place calls on memory that nobody else sees become functional ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch
from torch.utils._python_dispatch import _disable_current_modes

from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op, Value
from moec.ir.torch_bridge import resolve_target, to_python
from moec.ir.torch_dtypes import FROM_TORCH, TO_TORCH
from moec.ir.types import DType, SymType, TensorType
from moec.passes.aliases import AliasSets
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.calls import call_op
from moec.passes.effects import written_operands
from moec.passes.registry import register_pass

_TRIAL_STEP = 8
"""Symbolic dimensions stand for multiples of this where a call is tried on tensors without data."""


@register_pass
@dataclass(frozen=True)
class Functionalize(Pass):
    """Turns in-place ATen calls into functional ones where that cannot be seen.

    ``%y = aten.div_.Tensor(%x, %s)`` becomes ``aten.div.Tensor``, and every later use of ``%x`` uses the new value.
    Done when the call writes to its first argument only, has a functional twin (same name without the underscore,
    same overload, same arguments), and the value written to was made by an op of this graph in memory of its own:
    no argument, constant or view of one, and nothing else that shares its memory is used after the write. A result that
    type promotion would widen is cast back, as the in-place call does. Everything else stays, with a remark.
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
            new: list[Op] = []
            reason = _why_not(op, aliases, position)
            if reason is None:
                reason = _functional(op, new)
            if reason is not None:
                stats["left"] += 1
                ctx.remark("missed", self.name, f"{op.attrs['target']} stays in place: {reason}", op)
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
        if other is base:
            continue
        if other in op.operands:
            return f"{other!r}, another operand, may share its memory"
        if any(position[user] > position[op] for user in other.users):
            return f"{other!r} may share its memory and is used later"
    return None


@cache
def functional_twin(target: str) -> str | None:
    """``aten.div.Tensor`` for ``aten.div_.Tensor``; None where no op does the same without writing.

    The twin has the same overload name and the same arguments (names, types, kinds), aliases nothing, and is
    deterministic.
    """
    namespace, name, overload = target.split(".")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    twin = getattr(packet, overload, None) if packet is not None else None
    if twin is None or torch.Tag.nondeterministic_seeded in twin.tags or torch.Tag.inplace_view in _tags(target):
        return None
    mine, theirs = resolve_target(target)._schema, twin._schema
    same = [(a.name, str(a.type), a.kwarg_only) for a in mine.arguments] == [
        (a.name, str(a.type), a.kwarg_only) for a in theirs.arguments
    ]
    plain = all(a.alias_info is None for a in (*theirs.arguments, *theirs.returns))
    one_tensor = len(theirs.returns) == 1 and str(theirs.returns[0].type) == "Tensor"
    return f"{namespace}.{name[:-1]}.{overload}" if same and plain and one_tensor else None


def _tags(target: str) -> list[torch.Tag]:
    return list(resolve_target(target).tags)


def _functional(op: Op, new: list[Op]) -> str | None:
    """Fill ``new`` with the ops that stand for ``op``, or give the reason why there are none."""
    twin = functional_twin(op.attrs["target"])
    if twin is None:
        return "it has no functional twin"
    base = op.operands[0].type
    if not isinstance(base, TensorType):
        return f"{op.operands[0]!r} is no tensor"
    widened = result_dtype(twin, op)
    if isinstance(widened, str):
        return widened
    kwargs = op.attrs.get("kwargs", {})
    made = Op(
        "torch.call",
        op.operands,
        [base.with_(dtype=widened)],
        attrs={"target": twin, "args": op.attrs["args"], **({"kwargs": kwargs} if kwargs else {})},
        groups=op.groups,
        loc=op.loc,
    )
    new.append(made)
    if widened != base.dtype:
        new.append(call_op("aten.to.dtype", (made.result, base.dtype), {}, [base], loc=op.loc))
    return None


def result_dtype(target: str, op: Op) -> DType | str:
    """The element type that ``target`` gives on the arguments of ``op``, by trying it on tensors without data.

    Returns:
        The type, or as text the reason why it is not known.
    """
    sizes: dict[sympy.Basic, int] = {}

    def number(expr: Any) -> Any:
        free = sorted(expr.free_symbols, key=str)
        for s in free:
            sizes.setdefault(s, _TRIAL_STEP * (len(sizes) + 1))
        value = expr.subs({s: sizes[s] for s in free})
        return int(value) if value.is_Integer else float(value)

    values: list[Any] = []
    try:
        with _disable_current_modes():  # a compiler may call this while torch traces
            for v in op.operands:
                if isinstance(v.type, TensorType):
                    shape = [number(d) for d in v.type.shape]
                    values.append(torch.empty(shape, dtype=TO_TORCH[v.type.dtype.name], device="meta"))
                elif isinstance(v.type, SymType) and v.type.kind != "bool":
                    values.append(number(v.type.expr))
                else:
                    return f"operand {v!r} is neither a tensor nor a number"
            args, kwargs = to_python(op.attrs["args"], values), to_python(op.attrs.get("kwargs", {}), values)
            out = resolve_target(target)(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"its functional twin could not be tried: {str(error).splitlines()[0]}"
    found = FROM_TORCH.get(out.dtype)
    if found is None:
        return f"its functional twin gives {out.dtype}"
    if list(out.shape) != list(values[0].shape):
        return f"its functional twin gives the shape {list(out.shape)}, not {list(values[0].shape)}"
    return found
