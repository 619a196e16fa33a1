"""Reading a router: the attributes of ``moe.route`` from the torch calls that choose experts.

The reader goes backward from the ids and the weights and accepts only what the attributes say exactly. What it cannot
say is no error: the caller then makes the router a region.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moec.ir.core import Op, Value
from moec.ir.types import DType
from moec.passes.matching import CASTS, VIEWS, arg, function, last_dim, maker, peel, rank, tensor

_FLATTEN = VIEWS | {"alias"}


class NoAttribute(Exception):
    """This router is not one of the attributes' routers; ``str`` says what does not fit."""


@dataclass
class Router:
    """What was read: operands and attributes of ``moe.route``."""

    logits: Value
    bias: Value | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


def _dtype(value: Value) -> DType:
    t = tensor(value)
    if t is None:
        raise NoAttribute(f"{value!r} is no tensor")
    return t.dtype


def _device(value: Value) -> str:
    t = tensor(value)
    return t.device if t is not None else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _scaled(weights: Value) -> tuple[Value, float]:
    op = maker(weights, "mul", "div")
    if op is None:
        return weights, 1.0
    factor = _number(arg(op, 1, "other"))
    if factor is None or function(op) == "div":
        return weights, 1.0
    return arg(op, 0, "self"), factor


def _renormalised(weights: Value) -> tuple[Value, float | None]:
    """``(weights before, eps)`` if ``weights`` is divided by its own sum; eps None if it is not."""
    op = maker(weights, "div")
    if op is None or arg(op, 2, "rounding_mode") is not None:
        return weights, None
    source, total = arg(op, 0, "self"), arg(op, 1, "other")
    eps = 0.0
    plus = maker(total, "add")
    if plus is not None:
        number = _number(arg(plus, 1, "other"))
        if number is None or arg(plus, 2, "alpha", 1) != 1:
            raise NoAttribute("something is added to the sum of the weights")
        eps, total = number, arg(plus, 0, "self")
    summed = maker(total, "sum")
    if summed is None or arg(summed, 0, "self") is not source or arg(summed, 2, "keepdim", False) is not True:
        raise NoAttribute("the weights are divided by something else than their sum")
    if not last_dim(source, arg(summed, 1, "dim")):
        raise NoAttribute("the weights are added over another dimension than k")
    if not _dtype(source) == _dtype(total) == _dtype(weights):
        raise NoAttribute("the sum of the weights is taken in another type")
    return source, eps


def _unscored(value: Value, axis_rank: int = 2) -> tuple[Value, str, DType]:
    """``(logits, scoring, type of the scores)`` of a score tensor."""
    op = maker(value, "softmax", "_softmax", "sigmoid", "sqrt")
    if op is None:
        return value, "identity", _dtype(value)
    name = function(op)
    source = arg(op, 0, "self") if name != "sigmoid" else op.operands[0]
    if name in ("softmax", "_softmax"):
        if not last_dim(source, arg(op, 1, "dim")) or rank(source) != axis_rank:
            raise NoAttribute("the softmax does not run over the experts")
        if name == "_softmax" and arg(op, 2, "half_to_float", False) is True:
            return source, "softmax", _dtype(value)
        if arg(op, 2, "dtype") is None and _dtype(source) != _dtype(value):
            raise NoAttribute("the softmax changes type by itself (autocast)")
        return source, "softmax", _dtype(value)
    if _dtype(source) != _dtype(value):
        raise NoAttribute(f"{name} changes type")
    if name == "sigmoid":
        return source, "sigmoid", _dtype(value)
    soft = maker(source, "softplus")
    if soft is None or arg(soft, 1, "beta", 1) != 1 or arg(soft, 2, "threshold", 20) != 20:
        raise NoAttribute("a square root that is not of a softplus")
    return arg(soft, 0, "self"), "sqrtsoftplus", _dtype(value)


def _logits(value: Value, dtype: DType) -> Value:
    """The logits before the cast to the scores' type; a narrowing cast would change the choice, so it stays outside."""
    op = maker(value, *CASTS)
    if op is not None and rank(arg(op, 0, "self")) == 2 and _device(arg(op, 0, "self")) == _device(value):
        before: Value = arg(op, 0, "self")
        if _dtype(before).bits <= dtype.bits and _dtype(value) == dtype and _dtype(before).is_float:
            return before
    return value


def _mask_of_groups(mask: Value) -> tuple[Value, Value]:
    """``(worth, chosen groups)`` from the mask of experts outside the kept groups."""
    negated = maker(mask, "bitwise_not", "logical_not")
    kept = peel(arg(negated, 0, "self"), CASTS) if negated is not None else peel(mask, CASTS)
    if negated is None:
        compared = maker(kept, "eq")
        if compared is None or arg(compared, 1, "other") not in (0, False):
            raise NoAttribute("the masked experts are not those outside the kept groups")
        kept = peel(arg(compared, 0, "self"), CASTS)
    wide = maker(peel(kept, _FLATTEN), "expand")
    if wide is None:
        raise NoAttribute("the mask is not spread from groups to experts")
    spread, narrow = tensor(wide.results[0]), tensor(arg(wide, 0, "self"))
    filled = maker(peel(arg(wide, 0, "self"), _FLATTEN), "scatter")
    if filled is None or spread is None or arg(filled, 1, "dim") not in (1, -1) or arg(filled, 4, "reduce") is not None:
        raise NoAttribute("the mask of groups is not scattered from the chosen groups")
    if spread.rank != 3 or narrow is None or narrow.rank != 3 or narrow.shape[2] != 1:
        raise NoAttribute("the mask is not spread over neighbouring experts")
    if _number(arg(filled, 3, "value", arg(filled, 3, "src"))) != 1.0:
        raise NoAttribute("the mask of groups is not scattered with ones")
    base = maker(arg(filled, 0, "self"), "zeros_like", "zeros", "new_zeros", "full_like", "full")
    if base is not None and function(base).startswith("full") and _number(arg(base, 1, "fill_value")) != 0.0:
        raise NoAttribute("the mask of groups does not begin with zeros")
    chosen = maker(arg(filled, 2, "index"), "topk")
    if base is None or chosen is None or filled.operands[-1] is not chosen.results[1]:
        raise NoAttribute("the kept groups are not the top groups")
    if not _takes_largest(chosen):
        raise NoAttribute("the kept groups are not the top groups")
    return arg(chosen, 0, "self"), chosen.results[1]


def _takes_largest(topk: Op) -> bool:
    """True if a top-k takes the largest along the last dimension."""
    return arg(topk, 3, "largest", True) is True and last_dim(arg(topk, 0, "self"), arg(topk, 2, "dim", -1))


def _masked(choice: Value) -> tuple[Value, Value, float] | None:
    """``(scores, mask, fill)`` of ``masked_fill`` or its decomposition ``where(mask, fill, scores)``."""
    op = maker(choice, "masked_fill", "where")
    if op is None:
        return None
    if function(op) == "masked_fill":
        scores, mask, fill = arg(op, 0, "self"), arg(op, 1, "mask"), _number(arg(op, 2, "value"))
    else:
        mask, filling, scores = arg(op, 0, "condition"), arg(op, 1, "self"), arg(op, 2, "other")
        constant = maker(filling, "scalar_tensor")
        fill = _number(arg(constant, 0, "s")) if constant is not None else _number(filling)
        if tensor(scores) != tensor(choice):
            raise NoAttribute("masking changes the type or shape of the scores")
    if fill is None:
        raise NoAttribute("masked experts are filled with a tensor")
    return scores, mask, fill


def _groups(choice: Value, router: Router) -> Value:
    """Reads group-limited selection; gives the choice scores before masking."""
    masked = _masked(choice)
    if masked is None:
        return choice
    scores, mask, fill = masked
    worth, chosen = _mask_of_groups(mask)
    top = chosen.op
    assert top is not None
    worth_type, chosen_type, score_type = tensor(worth), tensor(chosen), tensor(scores)
    if worth_type is None or chosen_type is None or score_type is None or worth_type.rank != 2:
        raise NoAttribute("groups are not scored per token")
    if not (worth_type.shape[1].is_Integer and chosen_type.shape[1].is_Integer):
        raise NoAttribute("the number of groups is computed at run time")
    groups = int(worth_type.shape[1])
    best = maker(worth, "sum", "amax", "max")
    if best is None:
        raise NoAttribute("the worth of a group is neither its maximum nor a sum of its best")
    if function(best) == "sum":
        pair = maker(arg(best, 0, "self"), "topk")
        if (
            pair is None
            or arg(pair, 1, "k") != 2
            or not _takes_largest(pair)
            or not last_dim(arg(pair, 0, "self"), arg(best, 1, "dim"))
        ):
            raise NoAttribute("the worth of a group is not the sum of its best two")
        source, how = arg(pair, 0, "self"), "top2_sum"
        if best.operands[0] is not pair.results[0]:
            raise NoAttribute("the worth of a group is a sum of indices")
    else:
        source, how = arg(best, 0, "self"), "max"
        if not last_dim(source, arg(best, 1, "dim")) or worth is not best.results[0]:
            raise NoAttribute("the worth of a group is no maximum over its experts")
    by_group = tensor(source)
    if by_group is None or by_group.rank != 3 or by_group.shape[1] != groups or peel(source, VIEWS) is not scores:
        raise NoAttribute("groups are not made of neighbouring experts")
    router.attrs |= {
        "groups": groups,
        "top_groups": int(chosen_type.shape[1]),
        "group_score": how,
        "group_fill": fill,
    }
    return scores


def _chosen(ids: Value) -> Op:
    op = maker(ids, "topk")
    if op is None or ids is not op.results[1]:
        raise NoAttribute("the expert ids are not the indices of a top-k")
    if not _takes_largest(op):
        raise NoAttribute("the top-k does not take the largest over the experts")
    return op


def read_router(weights: Value, ids: Value) -> Router:
    """Operands and attributes of the router that makes ``weights`` [T, k] and ``ids`` [T, k].

    Raises:
        NoAttribute: The router is none of those that the attributes describe.
    """
    topk = _chosen(ids)
    k = arg(topk, 1, "k")
    if not isinstance(k, int):
        raise NoAttribute("k is computed at run time")
    attrs: dict[str, Any] = {"k": k, "sorted": arg(topk, 4, "sorted", True)}
    cast = maker(weights, *CASTS)
    if cast is not None and _device(cast.operands[0]) != _device(weights):
        raise NoAttribute("the weights go to another device")
    inner, scale = _scaled(arg(cast, 0, "self") if cast is not None else weights)
    inner, eps = _renormalised(inner)
    attrs |= {"scale": scale, "renormalize": eps is not None, "renorm_eps": eps or 0.0}
    router = Router(arg(topk, 0, "self"), None, attrs)
    source, scoring, dtype = _unscored(inner)
    if source is topk.results[0] and scoring != "identity":  # the top k of the logits, then scores of those
        logits = arg(topk, 0, "self")
        if _dtype(logits) != dtype and _dtype(logits).bits >= dtype.bits:
            raise NoAttribute("the scores are narrower than the logits")
        attrs |= {"order": "topk_first", "scoring": scoring, "score_dtype": dtype}
        router.logits = _logits(logits, dtype)
        return _checked(router)
    router.logits = _score_first(router, topk, inner)
    return _checked(router)


def _score_first(router: Router, topk: Op, inner: Value) -> Value:
    choice: Value = arg(topk, 0, "self")
    scores: Value | None = None
    picked = maker(inner, "gather")
    if picked is not None:
        if arg(picked, 1, "dim") not in (1, -1) or arg(picked, 2, "index") is not topk.results[1]:
            raise NoAttribute("the weights are gathered by other indices than the chosen experts")
        scores = arg(picked, 0, "self")
    elif inner is not topk.results[0]:
        raise NoAttribute("the weights are not the scores of the chosen experts")
    biased = _groups(choice, router)
    plain = biased
    plus = maker(biased, "add")
    if plus is not None and rank(arg(plus, 1, "other")) == 1 and arg(plus, 2, "alpha", 1) == 1:
        plain, router.bias = arg(plus, 0, "self"), arg(plus, 1, "other")
    if scores is None:
        if router.bias is not None:
            raise NoAttribute("the weights contain the selection bias")
        if "groups" in router.attrs:
            raise NoAttribute("the weights are the masked scores")
        scores = plain
    elif scores is not plain:
        raise NoAttribute("the weights come from other scores than the selection")
    logits, scoring, dtype = _unscored(scores)
    router.attrs |= {"scoring": scoring, "score_dtype": dtype}
    if router.bias is not None and _dtype(biased) != dtype:
        raise NoAttribute("the selection bias changes the type of the scores")
    return _logits(logits, dtype)


def _checked(router: Router) -> Router:
    if rank(router.logits) != 2:
        raise NoAttribute("the logits are no matrix [T, E]")
    return router
