"""Reading a router: the attributes of ``moe.route`` from the torch calls that choose experts.

The reader goes backward from the ids and the weights and accepts only what the attributes say exactly. What it cannot
say is no error: the caller then looks for a part that it can say, or makes the router a region.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moec.ir.core import Value
from moec.passes.fuse_routing.choose import Chosen, read_choice
from moec.passes.fuse_routing.groups import read_groups
from moec.passes.fuse_routing.scores import (
    NoAttribute,
    before_cast,
    dtype_of,
    renormalised,
    same_device,
    same_slots,
    scaled,
    unscored,
)
from moec.passes.matching import CASTS, arg, maker, peel, rank, tensor


@dataclass
class Router:
    """What was read: operands and attributes of ``moe.route``."""

    logits: Value
    bias: Value | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


def _matrix(value: Value) -> Value:
    """``value`` [T, 1] without the view that gives a vector [T] its second dimension."""
    inner = peel(value, ("unsqueeze", "view", "reshape", "alias"))
    return inner if rank(inner) == 1 and rank(value) == 2 else value


def read_router(weights: Value, ids: Value) -> Router:
    """Operands and attributes of the router that makes ``weights`` [T, k] and ``ids`` [T, k].

    Raises:
        NoAttribute: The router is none of those that the attributes describe.
    """
    chosen = read_choice(ids)
    weights = _matrix(weights)
    cast = maker(weights, *CASTS)
    if cast is not None and not same_device(cast.operands[0], weights):
        raise NoAttribute("the weights go to another device")
    inner, scale = scaled(arg(cast, 0, "self") if cast is not None else weights)
    inner, eps = renormalised(inner)
    attrs = {**chosen.attrs, "scale": scale, "renormalize": eps is not None, "renorm_eps": eps or 0.0}
    router = Router(chosen.scores, None, attrs)
    source, scoring, dtype = unscored(inner)
    if scoring != "identity" and chosen.values is not None and same_slots(source, chosen.values):
        # the top k of the logits, then scores of those
        if "groups" in attrs:
            raise NoAttribute("the best logits of every group are scored after the choice")
        if dtype_of(chosen.scores) != dtype and dtype_of(chosen.scores).bits >= dtype.bits:
            raise NoAttribute("the scores are narrower than the logits")
        attrs |= {"order": "topk_first", "scoring": scoring, "score_dtype": dtype}
        router.logits = before_cast(chosen.scores, dtype)
    else:
        router.logits = _score_first(router, chosen, ids, inner)
    if rank(router.logits) != 2:
        raise NoAttribute("the logits are no matrix [T, E]")
    return router


def _picked(inner: Value, chosen: Chosen, ids: Value) -> Value | None:
    """The scores that the weights are gathered from; None if they are the values of the choice itself."""
    picked = maker(inner, "gather")
    if picked is None:
        if chosen.values is None or not same_slots(inner, chosen.values):
            raise NoAttribute("the weights are not the scores of the chosen experts")
        return None
    if arg(picked, 1, "dim") not in (1, -1) or not same_slots(arg(picked, 2, "index"), ids):
        raise NoAttribute("the weights are gathered by other indices than the chosen experts")
    scores: Value = arg(picked, 0, "self")
    return scores


def _biased(choice: Value) -> tuple[Value, Value | None]:
    """``(scores, bias [E])`` of ``scores + bias``."""
    plus, experts = maker(choice, "add"), tensor(choice)
    if plus is None or experts is None or arg(plus, 2, "alpha", 1) != 1:
        return choice, None
    pair = arg(plus, 0, "self"), arg(plus, 1, "other")
    for scores, added in (pair, pair[::-1]):
        bias = peel(added, ("unsqueeze",))
        t = tensor(bias)
        if rank(scores) == 2 and t is not None and t.rank == 1 and t.shape[0] == experts.shape[1]:
            # an unsqueezed bias lies along the experts if it has one row
            wide = tensor(added)
            if wide is not None and wide.shape[-1] == t.shape[0]:
                return scores, bias
    return choice, None


def _score_first(router: Router, chosen: Chosen, ids: Value, inner: Value) -> Value:
    """Fills in bias, groups and scoring; the logits."""
    scores = _picked(inner, chosen, ids)
    by_group = "groups" in router.attrs  # chosen so: then there is no mask
    choice, groups = (chosen.scores, dict[str, Any]()) if by_group else read_groups(chosen.scores)
    router.attrs |= groups
    plain, router.bias = _biased(choice)
    if scores is not None and scores is not plain:
        plain = peel(plain, ("detach", "alias"))  # of the choice, which has no gradient; not of the weights
    scores = chosen.scores if scores is None else scores
    if router.bias is not None and (scores is chosen.scores or scores is choice):
        raise NoAttribute("the weights contain the selection bias")
    if groups and scores is chosen.scores:
        # A group's best experts are not masked, and their scores are their own.
        router.attrs["masked_weights"] = "top_groups" in groups
    elif scores is not plain:
        raise NoAttribute("the weights come from other scores than the selection")
    logits, scoring, dtype = unscored(plain)
    router.attrs |= {"scoring": scoring, "score_dtype": dtype}
    if router.bias is not None and dtype_of(choice) != dtype:
        raise NoAttribute("the selection bias changes the type of the scores")
    if "per_group" in groups:
        _check_ruled_out(router)
    return before_cast(logits, dtype)


def _check_ruled_out(router: Router) -> None:
    """What a group's mask rules out is chosen by no token, which is what ``per_group`` says.

    Raises:
        NoAttribute: A kept expert may tie with a masked one, or the top-k takes another number than the groups give.
    """
    attrs = router.attrs
    if attrs["k"] != attrs["groups"] * attrs["per_group"]:
        raise NoAttribute("the top-k takes another number of experts than the groups give")
    if router.bias is not None or attrs["scoring"] == "identity":
        raise NoAttribute("scores of -inf could tie with the experts that a group did not choose")
