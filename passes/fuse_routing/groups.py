"""Reading groups of experts from the mask that selection scores go through.

Two masks are known: all but the experts of the best groups (DeepSeek-V2, V3), and all but the best experts of every
group (mixture of grouped experts, masked form).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir.core import Op, Value
from moec.passes.fuse_routing.scores import NoAttribute, number
from moec.passes.matching import CASTS, VIEWS, arg, function, last_dim, maker, peel, peel_views, tensor


@dataclass(frozen=True)
class _Masked:
    """Scores some of which are overwritten.

    Attributes:
        kept: The mask, true (or 1) where a score stays.
    """

    scores: Value
    kept: Value
    fill: float


def takes_largest(topk: Op) -> bool:
    """True if a top-k takes the largest along the last dimension."""
    return arg(topk, 3, "largest", True) is True and last_dim(arg(topk, 0, "self"), arg(topk, 2, "dim", -1))


def neighbours(by_group: Value, scores: Value) -> tuple[int, int] | None:
    """``(groups, experts in each)`` if ``by_group`` [T, groups, n] is ``scores`` [T, E] cut into neighbours."""
    cut, flat = tensor(by_group), tensor(scores)
    if cut is None or flat is None or cut.rank != 3 or flat.rank != 2 or peel_views(by_group) is not peel_views(scores):
        return None
    if not (cut.shape[1].is_Integer and cut.shape[2].is_Integer) or cut.shape[1] * cut.shape[2] != flat.shape[1]:
        return None
    return int(cut.shape[1]), int(cut.shape[2])


def _turned(mask: Value) -> Value | None:
    """What ``mask`` is the negation of, if it is one: ``~m``, or ``m == 0``."""
    negated = maker(mask, "bitwise_not", "logical_not")
    if negated is not None:
        inner: Value = arg(negated, 0, "self")
        return inner
    compared = maker(mask, "eq")
    if compared is None or arg(compared, 1, "other") not in (0, False):
        return None
    source: Value = arg(compared, 0, "self")
    return source


def _constant(value: Any) -> float | None:
    """The number that a value is full of; None if that is not known."""
    made = maker(value, "scalar_tensor", "full", "full_like")
    if made is None:
        return number(value)
    return number(arg(made, 0, "s") if function(made) == "scalar_tensor" else arg(made, 1, "fill_value"))


def _masked(choice: Value) -> _Masked | None:
    """``masked_fill(scores, ~kept, fill)``, ``where(~kept, fill, scores)`` or ``where(kept, scores, fill)``."""
    op = maker(choice, "masked_fill", "where")
    if op is None:
        return None
    outside = True  # the mask marks what is overwritten
    if function(op) == "masked_fill":
        scores, mask, fill = arg(op, 0, "self"), arg(op, 1, "mask"), number(arg(op, 2, "value"))
    else:
        mask, first, second = arg(op, 0, "condition"), arg(op, 1, "self"), arg(op, 2, "other")
        scores, fill = second, _constant(first)
        if fill is None:
            scores, fill, outside = first, _constant(second), False
        if tensor(scores) != tensor(choice):
            raise NoAttribute("masking changes the type or shape of the scores")
    if fill is None:
        raise NoAttribute("masked experts are filled with a tensor")
    kept = _turned(mask) if outside else mask
    if kept is None or (not outside and _turned(mask) is not None):
        raise NoAttribute("the masked experts are not those outside the kept groups")
    return _Masked(scores, peel(kept, CASTS), fill)


def _scattered_best(mask: Value) -> Op:
    """The top-k whose indices ``mask`` is scattered from with ones, along the last dimension.

    Raises:
        NoAttribute: The mask is made in another way.
    """
    filled = maker(mask, "scatter")
    t = tensor(mask)
    if filled is None or t is None or arg(filled, 4, "reduce") is not None or not last_dim(mask, arg(filled, 1, "dim")):
        raise NoAttribute("the mask of groups is not scattered from the chosen groups")
    if arg(filled, 3, "value", arg(filled, 3, "src")) not in (1, True):
        raise NoAttribute("the mask of groups is not scattered with ones")
    base = maker(peel(arg(filled, 0, "self"), CASTS), "zeros_like", "zeros", "new_zeros", "full_like", "full")
    if base is not None and function(base).startswith("full") and arg(base, 1, "fill_value") not in (0, False):
        raise NoAttribute("the mask of groups does not begin with zeros")
    chosen = maker(arg(filled, 2, "index"), "topk")
    if base is None or chosen is None or arg(filled, 2, "index") is not chosen.results[1] or not takes_largest(chosen):
        raise NoAttribute("the kept groups are not the top groups")
    return chosen


def _worth(best: Op | None, worth: Value) -> tuple[Value, str]:
    """``(scores by group, "max" or "top2_sum")`` from the op that makes the groups' worth."""
    if best is None:
        raise NoAttribute("the worth of a group is neither its maximum nor a sum of its best")
    if function(best) != "sum":
        source = arg(best, 0, "self")
        if not last_dim(source, arg(best, 1, "dim")) or worth is not best.results[0]:
            raise NoAttribute("the worth of a group is no maximum over its experts")
        return source, "max"
    pair = maker(arg(best, 0, "self"), "topk")
    if pair is None or arg(pair, 1, "k") != 2 or not takes_largest(pair):
        raise NoAttribute("the worth of a group is not the sum of its best two")
    if not last_dim(arg(pair, 0, "self"), arg(best, 1, "dim")):
        raise NoAttribute("the worth of a group is not the sum of its best two")
    if best.operands[0] is not pair.results[0]:
        raise NoAttribute("the worth of a group is a sum of indices")
    return arg(pair, 0, "self"), "top2_sum"


def _best_groups(masked: _Masked, wide: Op) -> dict[str, Any]:
    """Attributes where ``wide`` spreads a mask of groups over their experts."""
    spread, narrow = tensor(wide.results[0]), tensor(arg(wide, 0, "self"))
    if spread is None or spread.rank != 3 or narrow is None or narrow.rank != 3 or narrow.shape[2] != 1:
        raise NoAttribute("the mask is not spread over neighbouring experts")
    chosen = _scattered_best(peel(arg(wide, 0, "self"), VIEWS))
    worth = arg(chosen, 0, "self")
    worth_type, kept_type = tensor(worth), tensor(chosen.results[1])
    if worth_type is None or kept_type is None or worth_type.rank != 2:
        raise NoAttribute("groups are not scored per token")
    if not (worth_type.shape[1].is_Integer and kept_type.shape[1].is_Integer):
        raise NoAttribute("the number of groups is computed at run time")
    source, how = _worth(maker(worth, "sum", "amax", "max"), worth)
    cut = neighbours(source, masked.scores)
    if cut is None or cut[0] != worth_type.shape[1]:
        raise NoAttribute("groups are not made of neighbouring experts")
    return {"groups": cut[0], "top_groups": int(kept_type.shape[1]), "group_score": how, "group_fill": masked.fill}


def _best_of_groups(masked: _Masked, mask: Value) -> dict[str, Any]:
    """Attributes where ``mask`` [T, groups, n] marks the best experts of every group."""
    chosen = _scattered_best(mask)
    each = arg(chosen, 1, "k")
    cut = neighbours(arg(chosen, 0, "self"), masked.scores)
    if cut is None or not isinstance(each, int):
        raise NoAttribute("groups are not made of neighbouring experts")
    spread = tensor(mask)
    if spread is None or spread.rank != 3 or (spread.shape[1], spread.shape[2]) != cut:
        raise NoAttribute("the mask is not that of the groups' experts")
    if masked.fill != float("-inf"):
        raise NoAttribute("experts that a group did not choose are not ruled out: they are filled with a number")
    return {"groups": cut[0], "per_group": each}


def read_groups(choice: Value) -> tuple[Value, dict[str, Any]]:
    """``(scores, attributes)``: the selection scores before masking, and what the mask says of groups.

    Raises:
        NoAttribute: There is a mask, and it is none of the known.
    """
    masked = _masked(choice)
    if masked is None:
        return choice, {}
    spread = peel(masked.kept, VIEWS)
    wide = maker(spread, "expand")
    if wide is not None:
        return masked.scores, _best_groups(masked, wide)
    if maker(spread, "scatter") is None:
        raise NoAttribute("the mask is not spread from groups to experts")
    return masked.scores, _best_of_groups(masked, spread)
