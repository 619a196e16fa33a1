"""The C++ source of one router: its sizes, types and kind around the templates of ``include/route.h``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.backends.calls import UnsupportedError
from moec.backends.cpu.cpp import C_TYPES, boolean, real
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.types import TensorType

MOST_EXPERTS = 4096
"""Rows of scores are on the stack."""
_LARGEST = {"f16": 65504.0, "bf16": 3.3895313892515355e38, "f32": 3.4028234663852886e38}
_TEMPLATE = """\
#include "route.h"

using namespace moec;

namespace {{
struct Kind {{
    using Logit = {logit};
    using Score = {score};
    using Bias = {bias};
    using Choice = {choice};
    using Out = {out};
    static constexpr Scoring SCORING = Scoring::{scoring};
    static constexpr int E = {experts}, K = {k}, GROUPS = {groups}, TOP_GROUPS = {top_groups};
    static constexpr int PER_GROUP = {per_group};
    static constexpr bool BIAS = {has_bias}, TOPK_FIRST = {topk_first}, SORTED = {sorted}, TWO = {two};
    static constexpr bool BY_GROUP = {by_group}, FIRST = {first};
    static constexpr bool RENORMALIZE = {renormalize}, MASKED = {masked};
    static constexpr float FILL = {fill}, EPS = {eps}, SCALE = {scale};
}};
}}

extern "C" __attribute__((visibility("default"))) void moec_route(const RouteCall* call) {{ route<Kind>(*call); }}
"""


@dataclass(frozen=True)
class Router:
    """What the kernel is generated for.

    Attributes:
        logit, score, out: Element types of the logits, the scores and the weights.
        bias: Element type of the bias that the selection adds; empty if there is none.
        groups: Number of expert groups, 0 for none.
        two: A group is worth the sum of its best two.
        masked: Weights are the scores as the groups' mask leaves them.
        per_group: Experts that every group gives, 0 where they may come from anywhere.
        by_group: Those come group after group.
        first: Of equal scores the first is taken; else as torch.topk takes them.
        fill: Selection score outside the kept groups.
        eps: Added to the sum that weights are divided by.
    """

    logit: str
    score: str
    out: str
    bias: str
    experts: int
    k: int
    scoring: str
    topk_first: bool
    groups: int
    top_groups: int
    two: bool
    fill: float
    renormalize: bool
    eps: float
    scale: float
    sorted: bool
    masked: bool
    per_group: int
    by_group: bool
    first: bool

    @property
    def choice(self) -> str:
        """Element type of what is selected by: torch's common type of scores and bias."""
        return self.score if self.bias in ("", self.score) else "f32"


def read_router(op: Op) -> Router:
    """The sizes, types and kind of a ``moe.route`` op.

    Raises:
        UnsupportedError: Something in it is not covered; the message ends "cannot run this op: ...".
    """
    if op.regions:
        raise UnsupportedError("the router is a region")
    for value in (*op.operands, *op.results):
        if not isinstance(value.type, TensorType):
            raise UnsupportedError(f"{value!r} is no tensor")
        if value.type.device != "cpu":
            raise UnsupportedError(f"{value!r} is on {value.type.device}")
    get = op_def(op.name).attr
    logits, weights, ids = (v.type for v in (op.operands[0], *op.results))
    assert isinstance(logits, TensorType)
    assert isinstance(weights, TensorType)
    assert isinstance(ids, TensorType)
    if not logits.shape[1].is_Integer:
        raise UnsupportedError(f"the number of experts is not fixed: {logits.shape[1]}")
    if ids.dtype.name != "i64":
        raise UnsupportedError(f"ids of type {ids.dtype}")
    first = get(op, "order") == "topk_first"
    # A router that takes the top k of the logits looks at neither bias nor groups.
    bias = "" if first or not op.group("bias") else _name(op.group("bias")[0].type)
    score = get(op, "score_dtype").name
    for name in (logits.dtype.name, score, weights.dtype.name, bias or score):
        if name not in C_TYPES:
            raise UnsupportedError(f"elements of type {name}; supported are {', '.join(C_TYPES)}")
    router = Router(
        logit=logits.dtype.name,
        score=score,
        out=weights.dtype.name,
        bias=bias,
        experts=int(logits.shape[1]),
        k=get(op, "k"),
        scoring=get(op, "scoring"),
        topk_first=first,
        groups=0 if first else get(op, "groups"),
        top_groups=get(op, "top_groups"),
        two=get(op, "group_score") == "top2_sum",
        fill=get(op, "group_fill"),
        renormalize=get(op, "renormalize"),
        eps=get(op, "renorm_eps"),
        scale=get(op, "scale"),
        sorted=get(op, "sorted"),
        masked=get(op, "masked_weights"),
        per_group=get(op, "per_group"),
        by_group=get(op, "by_group"),
        first=get(op, "ties") == "first",
    )
    _check(router)
    return router


def _name(type: object) -> str:
    assert isinstance(type, TensorType)
    return type.dtype.name


def _check(r: Router) -> None:
    if r.experts > MOST_EXPERTS:
        raise UnsupportedError(f"{r.experts} experts; at most {MOST_EXPERTS} are supported")
    if not r.groups:
        return
    if r.experts % r.groups:
        raise UnsupportedError(f"{r.experts} experts do not make {r.groups} groups of one size")
    if r.per_group:
        return
    if r.two and r.experts < 2 * r.groups:
        raise UnsupportedError("a group of one expert has no best two")
    if math.isfinite(r.fill) and abs(r.fill) > _LARGEST[r.choice]:
        raise UnsupportedError(f"group_fill = {r.fill} is out of the range of {r.choice}")


def write_router(r: Router) -> str:
    """The source; routers that differ in nothing but names have the same."""
    return _TEMPLATE.format(
        logit=C_TYPES[r.logit],
        score=C_TYPES[r.score],
        bias=C_TYPES[r.bias or r.score],
        choice=C_TYPES[r.choice],
        out=C_TYPES[r.out],
        scoring=r.scoring,
        experts=r.experts,
        k=r.k,
        groups=r.groups,
        top_groups=r.top_groups,
        has_bias=boolean(bool(r.bias)),
        topk_first=boolean(r.topk_first),
        sorted=boolean(r.sorted),
        two=boolean(r.two),
        masked=boolean(r.masked),
        per_group=r.per_group,
        by_group=boolean(r.by_group),
        first=boolean(r.first),
        renormalize=boolean(r.renormalize),
        fill=real(r.fill),
        eps=real(r.eps),
        scale=real(r.scale),
    )
