"""The C++ source of one router: its sizes, types and kind around the templates of ``include/route.h``."""

from __future__ import annotations

import math

from moec.backends import routers
from moec.backends.calls import UnsupportedError
from moec.backends.cpu.cpp import C_TYPES, boolean, real
from moec.backends.routers import Router
from moec.ir.core import Op
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


def read_router(op: Op) -> Router:
    """The sizes, types and kind of a ``moe.route`` op.

    Raises:
        UnsupportedError: Something in it is not covered; the message ends "cannot run this op: ...".
    """
    for value in (*op.operands, *op.results):
        if isinstance(value.type, TensorType) and value.type.device != "cpu":
            raise UnsupportedError(f"{value!r} is on {value.type.device}")
    router = routers.read(op, C_TYPES, Router)
    _check(router)
    return router


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
