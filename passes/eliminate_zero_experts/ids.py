"""Reading expert ids: what they were before the ids of dropped slots were overwritten, and which ids a mask drops.

A layer written for static shapes gives its dropped slots an id that exists, such as 0. What they had before was often
out of range already, since that is how the layer knew them; then nothing has to be computed to mark them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moec.ir.core import Op, Value
from moec.passes.eliminate_zero_experts.masks import Mask, as_mask, constant, is_bool, selected
from moec.passes.matching import CASTS, VIEWS, arg, between, clamp_bounds, function, last_dim, maker, tensor

LOWEST, HIGHEST = -(2**63), 2**63 - 1
_EXACT_BITS = 32
"""Casts to fewer bits could change an id."""
_Known = dict[Mask, tuple[Value, "IdSet"] | None]
_CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "max"})


@dataclass(frozen=True)
class IdSet:
    """A set of integers, as closed ranges in ascending order with gaps between them."""

    ranges: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(*ranges: tuple[int, int]) -> IdSet:
        """The union of closed ranges; empty ones (first > last) count for nothing."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted(r for r in ranges if r[0] <= r[1]):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(high, merged[-1][1])
            else:
                merged.append((low, high))
        return IdSet(tuple(merged))

    def __or__(self, other: IdSet) -> IdSet:
        return IdSet.of(*self.ranges, *other.ranges)

    def __invert__(self) -> IdSet:
        edges = [LOWEST - 1, *(n for r in self.ranges for n in r), HIGHEST + 1]
        return IdSet.of(*((low + 1, high - 1) for low, high in zip(edges[::2], edges[1::2], strict=True)))

    def __and__(self, other: IdSet) -> IdSet:
        return ~(~self | ~other)

    def __le__(self, other: IdSet) -> bool:
        return not (self & ~other).ranges


def valid(experts: int) -> IdSet:
    """The ids of real experts."""
    return IdSet.of((0, experts - 1))


def root(value: Any) -> Any:
    """The ids behind views and casts that change none of them."""
    while (op := maker(value, *VIEWS, *CASTS, "detach")) is not None:
        source, t = tensor(arg(op, 0, "self")), tensor(value)
        if source is None or t is None or source.dtype.kind != "int" or t.dtype.kind != "int":
            return value
        if t.dtype.bits < min(_EXACT_BITS, source.dtype.bits):
            return value
        value = arg(op, 0, "self")
    return value


def _universe(ids: Value) -> IdSet:
    """The ids that there may be: indices of a top-k are those of what it chose from."""
    op = maker(ids, *_CHOICES)
    chosen = tensor(arg(op, 0, "self")) if op is not None else None
    if op is None or chosen is None or ids is not op.results[-1] or (function(op) == "max" and len(op.results) != 2):
        return IdSet.of((LOWEST, HIGHEST))
    at = {"topk": 2, "sort": 1, "argsort": 1, "argmax": 1, "max": 1}[function(op)]
    size = chosen.shape[-1] if chosen.rank and last_dim(op.operands[0], arg(op, at, "dim", -1)) else None
    return IdSet.of((0, int(size) - 1 if size is not None and size.is_Integer else HIGHEST))


def _compared(op: Op) -> IdSet | None:
    number = arg(op, 1, "other")
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    return {
        "ge": IdSet.of((number, HIGHEST)),
        "gt": IdSet.of((number + 1, HIGHEST)),
        "lt": IdSet.of((LOWEST, number - 1)),
        "le": IdSet.of((LOWEST, number)),
        "eq": IdSet.of((number, number)),
        "ne": ~IdSet.of((number, number)),
    }[function(op)]


def drops(value: Value, dead: bool) -> tuple[Value, IdSet] | None:
    """``(ids, set)`` if a mask is ``dead`` exactly where those ids are in the set."""
    mask = as_mask(value, dead)
    if mask is None:
        return None
    op = maker(mask.value, "ge", "gt", "lt", "le", "eq", "ne")
    if op is not None:
        found = None if is_bool(arg(op, 0, "self")) else _compared(op)
        return None if found is None else (root(arg(op, 0, "self")), found if mask.dead else ~found)
    op = maker(mask.value, "bitwise_or", "logical_or", "__or__", "bitwise_and", "logical_and", "__and__")
    if op is None:
        return None
    parts = [drops(v, True) if is_bool(v) else None for v in (arg(op, 0, "self"), arg(op, 1, "other"))]
    one, other = parts
    if one is None or other is None or one[0] is not other[0]:
        return None
    both = one[1] | other[1] if "or" in function(op) else one[1] & other[1]
    return one[0], both if mask.dead else ~both


@dataclass
class LiveIds:
    """What is known of a block's ids.

    Attributes:
        value: The ids with what was done to dropped slots taken off.
        unmarked: Masks whose slots may still have the id of an expert.
        ops: The calls that were read.
    """

    value: Value
    unmarked: list[Mask]
    ops: list[Op]


def read_ids(ids: Value, masks: Sequence[Mask], experts: int, sentinels: bool) -> LiveIds:
    """Look behind ``ids`` [T, k], as far as only ids of slots that ``masks`` drop were changed.

    Args:
        ids: The ids that a block dispatches by.
        masks: The slots that its weights drop.
        experts: E.
        sentinels: Ids out of range mean no expert already.
    """
    known = {m: drops(m.value, m.dead) if m.aligned else None for m in masks}
    ops: list[Op] = []
    marked: set[Mask] = set()
    value = seen = ids  # seen: behind calls that mark slots; those stay, and other slots have the ids behind them
    while (op := root(seen).op) is not None:
        found = _behind(op, known, experts, sentinels)
        if found is None or (value is not seen and not found.marks):
            break
        ops.append(op)
        seen = found.ids
        marked |= found.marked
        if not found.marks:
            value = seen
    source = root(seen)
    for mask, fact in known.items():
        if fact is not None and fact[0] is source and not (fact[1] & valid(experts)).ranges:
            marked.add(mask)
    for mask in masks:
        ops += _truth_ops(mask.value)
    if value is not ids and tensor(root(value)) == tensor(ids):
        ops += between([root(value)], value)
        value = root(value)
    return LiveIds(value, [m for m in masks if m not in marked], ops)


def _truth_ops(value: Value) -> list[Op]:
    """The calls that make a truth value from others, back to comparisons."""
    if not is_bool(value) or value.op is None:
        return []
    return [value.op, *(op for v in value.op.operands for op in _truth_ops(v))]


@dataclass(frozen=True)
class _Behind:
    """The ids that a call changes at some slots.

    Attributes:
        ids: Before the call.
        marks: It gives these slots an id that means no expert. Else these slots are dropped ones.
        marked: Masks of which it marks all slots.
    """

    ids: Value
    marks: bool = False
    marked: frozenset[Mask] = frozenset()


def _behind(op: Op, known: _Known, experts: int, sentinels: bool) -> _Behind | None:
    """What ``op`` does to ids, if it changes those of dropped slots alone or marks slots."""
    masks = [m for m in known if m.aligned]
    chosen = selected(op)
    if chosen is not None:
        condition, taken, left = chosen
        for dead, filled, rest in ((True, taken, left), (False, left, taken)):
            if tensor(rest) is None or tensor(rest) != tensor(op.results[0]):
                continue
            dropped = any(_covers(m, known[m], condition, dead) for m in masks)
            number = constant(filled)
            if number is not None and not 0 <= number < experts and (sentinels or dropped):
                whole, fact = as_mask(condition, dead), drops(condition, dead)
                return _Behind(rest, True, frozenset(m for m in masks if _covers(whole, fact, m.value, m.dead)))
            if dropped:
                return _Behind(rest)
        return None
    if op.name != "torch.call":
        return None
    source, other = arg(op, 0, "self"), arg(op, 1, "other")
    if function(op) in ("mul", "multiply"):
        for ids, factor in ((source, other), (other, source)):
            mask = as_mask(factor, False)
            if mask is None or tensor(ids) is None or tensor(ids) != tensor(op.results[0]):
                continue
            if any(_covers(m, known[m], mask.value, mask.dead) for m in masks):
                return _Behind(ids)
        return None
    kept = _kept(op)
    if kept is None or tensor(source) != tensor(op.results[0]):
        return None
    changed = ~kept & _universe(root(source))
    facts = (f for m, f in known.items() if f is not None and f[0] is root(source))
    return _Behind(source) if any(changed <= dropped for _, dropped in facts) else None


def _covers(mask: Mask | None, fact: tuple[Value, IdSet] | None, condition: Value, dead: bool) -> bool:
    """True if ``mask`` drops all slots where ``condition`` is ``dead``."""
    other = as_mask(condition, dead)
    if mask is None or other is None:
        return False
    if (mask.value, mask.dead) == (other.value, other.dead):
        return True
    its = drops(condition, dead)
    return fact is not None and its is not None and fact[0] is its[0] and its[1] <= fact[1]


def _kept(op: Op) -> IdSet | None:
    """The ids that a bound or a remainder leaves as they are."""
    name, bound = function(op), arg(op, 1, "other")
    if name in ("remainder", "fmod") and isinstance(bound, int) and bound > 0:
        return IdSet.of((0, bound - 1))
    bounds = clamp_bounds(op)
    if bounds is None or not all(b is None or isinstance(b, int) for b in bounds):
        return None
    low, high = bounds
    return IdSet.of((LOWEST if low is None else low, HIGHEST if high is None else high))
