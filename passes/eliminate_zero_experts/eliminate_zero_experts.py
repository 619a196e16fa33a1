"""The pass ``eliminate-zero-experts``.

Contract:
1. A slot (token, k-th choice) whose router weight is 0 under a mask becomes a slot of no expert: ``sentinels`` is set
   and its id lies outside 0 .. E-1. It then costs no row of a GEMM, no memory and no communication.
2. The terms that zero-compute experts stand for (nothing, x, a·x + b·v) are torch calls beside the block; they stay.
3. Weights are used as they were by everybody else; ids of other slots are the same.
4. A block without masks in its weights is left alone without a word, one with masks that say nothing with a remark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import op_def
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.calls import call_op
from moec.passes.dce import erase_unused
from moec.passes.eliminate_zero_experts.ids import LiveIds, read_ids
from moec.passes.eliminate_zero_experts.masks import Masks, read_masks, same_shape, without_mask
from moec.passes.hazards import write_within
from moec.passes.matching import CASTS, VIEWS, arg, function, maker, tensor
from moec.passes.registry import register_pass

_IDS = 1  # operand of moe.experts and moe.dispatch
_INSIDE = ("moe.grouped_gemm", "moe.activation")


class _Stays(Exception):
    """The block cannot be changed; ``str`` is the reason."""


@dataclass(frozen=True)
class _Block:
    """One block: the op that sends slots to experts, and the one that weights them. ``moe.experts`` is both."""

    head: Op
    tail: Op

    @property
    def weights_at(self) -> int:
        return 2 if self.tail.name == "moe.experts" else 1

    @property
    def weights(self) -> Value:
        return self.tail.operands[self.weights_at]

    @property
    def experts(self) -> int:
        return int(self.head.attrs["experts"])


def _blocks(graph: Graph) -> Iterator[_Block]:
    for op in list(graph.ops):
        if op.name == "moe.experts":
            yield _Block(op, op)
        elif op.name == "moe.dispatch":
            combines = [u for u in op.results[1].users if u.name == "moe.combine"]
            if len(combines) == 1:
                yield _Block(op, combines[0])


def _check_closed(block: _Block) -> None:
    """Refuse a chain whose rows are seen from outside: rows of no expert lie elsewhere than they did."""
    stack, seen = list(block.head.results) if block.head is not block.tail else [], set[Op]()
    while stack:
        value = stack.pop()
        for user in value.users:
            if user.name in _INSIDE and user not in seen:
                seen.add(user)
                stack.extend(user.results)
            elif user.name not in _INSIDE and user is not block.tail:
                raise _Stays(f"{value!r}, inside the block, is also used elsewhere")


def _check(graph: Graph, block: _Block, read: Sequence[Op], live: LiveIds) -> None:
    """Refuse what cannot be said, comes too late, or may be overwritten between mask and experts."""
    _check_closed(block)
    ids, old = tensor(live.value), tensor(block.head.operands[_IDS])
    assert ids is not None and old is not None
    if live.unmarked and block.experts >= 2 ** (ids.dtype.bits - 1):
        raise _Stays(f"{ids.dtype} has no number to mark a slot of no expert beside {block.experts} experts")
    shaped = [live.value, *(m.value for m in live.unmarked if m.aligned)]
    if not old.shape[1].is_Integer and not all(same_shape(v, block.head.operands[_IDS]) for v in shaped):
        raise _Stays("k is computed at run time and the mask does not have the shape of the ids")
    position = {op: i for i, op in enumerate(graph.ops)}
    for mask in live.unmarked:
        if mask.value.op is not None and position[mask.value.op] > position[block.head]:
            raise _Stays(f"the mask {mask.value!r} is computed after the dispatch")
    write = write_within(graph, {*read, *live.ops, block.head, block.tail})
    if write is not None:
        raise _Stays(f"{write.attrs.get('target', write.name)} writes to memory of the router while it runs")


def _marked_ids(graph: Graph, block: _Block, live: LiveIds) -> Value:
    """The ids with E for every slot of a mask that does not show in them."""
    old = block.head.operands[_IDS]
    slots = tensor(old)
    assert slots is not None

    def add(target: str, args: Sequence[object], like: Value) -> Value:
        t = tensor(like)
        assert t is not None
        made = call_op(target, args, {}, [t.with_(shape=slots.shape)], loc=block.head.loc, names=["ids"])
        return graph.insert_before(block.head, made).result

    def matrix(value: Value, aligned: bool = True) -> Value:
        if not aligned or same_shape(value, old):
            return value
        return add("aten.reshape.default", (value, [-1, int(slots.shape[1])]), value)

    ids = matrix(live.value)
    for mask in live.unmarked:
        where = matrix(mask.value, mask.aligned)
        args = (where, block.experts, ids) if mask.dead else (where, ids, block.experts)
        ids = add(f"aten.where.{'ScalarSelf' if mask.dead else 'ScalarOther'}", args, ids)
    return ids


def _bare(block: _Block, masks: Masks) -> list[tuple[Op, int, Value]]:
    """Operands to replace so that weights reach the block unmasked: it does not look at those of dropped slots.

    What is unmasked reaches nobody else: from there to the block every value has one use. This leaves a router that
    its attributes describe, with the zero-compute experts among its choices.
    """
    found: list[tuple[Op, int, Value]] = []
    user, index, value = block.tail, block.weights_at, block.weights
    while True:
        source = without_mask(value, masks.found)
        if source is not None:
            while (copy := maker(source, "clone")) is not None and copy.operands[0].type == source.type:
                masks.ops.append(copy)
                source = copy.operands[0]
            found = [f for f in found if f[:2] != (user, index)]
            found.append((user, index, source))
            value = source
            continue
        op = value.op
        if op is None or any(u is not user for u in value.users) or not _keeps_slots_apart(op):
            return found
        user, index, value = op, 0, op.operands[0]


def _keeps_slots_apart(op: Op) -> bool:
    """True for views, casts, and products and quotients with a number."""
    if function(op) in VIEWS | CASTS:
        return True
    return function(op) in ("mul", "div") and not isinstance(arg(op, 1, "other"), Value)


@register_pass
@dataclass(frozen=True)
class EliminateZeroExperts(Pass):
    """Takes routed slots whose weight is 0 under a mask out of the expert computation.

    Layers with zero-compute experts (MoE++, arXiv:2410.07348; LongCat-Flash, arXiv:2509.01322) or null experts
    (AdaMoE, arXiv:2406.13233), with top-p or dropped tokens are written for static shapes: such a slot goes through
    some expert, often expert 0, and its weight is 0. Here the weights are read backward for masks (``where``,
    ``masked_fill``, ``w[mask] = 0``, ``w * mask``, a softmax over -inf), through casts, views, a renormalisation and
    whatever else keeps a 0. The slots of a mask get ids that mean no expert (``sentinels``): those they had before a
    ``where``, bound or remainder gave them one that exists, if these lie outside 0 .. E-1 by the mask's own words
    (``ids >= E``); else E. The mask on the weights then does nothing for the block and is left out where nobody else
    sees it, so that the router can be one of ``moe.route``'s.

    What changes: GEMMs have fewer rows, and a library may add up in another order for another number of rows. A slot
    left out added 0 · f(x): +0 or -0, or NaN where f(x) is not finite. A token without any expert whose weights are
    divided by their sum alone is 0, where 0/0 made it NaN. Gradients are the same: ``where`` and a mask that holds no
    numbers hand none back. A mask mixed with numbers (straight-through) does, and is refused. Ids out of range are no
    error any more in such a block.
    """

    name: ClassVar[str] = "eliminate-zero-experts"
    pass_class: ClassVar[PassClass] = PassClass.REORDERS
    tolerance: ClassVar[float] = 2e-5
    summary: ClassVar[str] = "slots of weight 0 take part in no expert"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        stats = {"blocks": 0, "masks": 0}
        for block in _blocks(graph):
            masks = read_masks(block.weights)
            for _, reason in masks.refused:
                ctx.remark("missed", self.name, reason, block.tail)
            if not masks.found:
                continue
            sentinels = op_def(block.head.name).attr(block.head, "sentinels")
            live = read_ids(block.head.operands[_IDS], masks.found, block.experts, sentinels)
            bare = _bare(block, masks)
            if sentinels and live.value is block.head.operands[_IDS] and not live.unmarked and not bare:
                continue
            try:
                _check(graph, block, masks.ops, live)
            except _Stays as obstacle:
                ctx.remark("missed", self.name, str(obstacle), block.tail)
                continue
            what = f"slots masked by {', '.join(repr(m.value) for m in masks.found)} take part in no expert"
            if not ctx.take_fuel(self.name, what, block.tail):
                break
            ctx.remark("applied", self.name, what, block.tail)
            _rewrite(graph, block, live, bare)
            stats["blocks"] += 1
            stats["masks"] += len(masks.found)
        return PassResult(stats["blocks"] > 0, stats)


def _rewrite(graph: Graph, block: _Block, live: LiveIds, bare: list[tuple[Op, int, Value]]) -> None:
    gone = [block.head.operands[_IDS].op, *(op.operands[i].op for op, i, _ in bare)]
    block.head.set_operand(_IDS, _marked_ids(graph, block, live))
    block.head.attrs["sentinels"] = True
    for op, index, value in bare:
        op.set_operand(index, value)
    for op_gone in gone:
        if op_gone is not None:
            erase_unused(op_gone)
