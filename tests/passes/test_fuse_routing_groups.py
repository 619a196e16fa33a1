"""``fuse-routing`` on choices per group and on ties: every way to write them, and what is not one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moec.ir.opdef import op_def
from moec.ir.routing import EqualLoad, equal_load_groups
from tests.passes.test_fuse_routing import GROUPS, E, K, Routed, Router, hold, route_of, routed

SIZE = E // GROUPS
INF = float("inf")


def _per_group(each: int = 1, first: str = "stepped", gather: bool = False, flat: bool = True) -> Router:
    def router(logits: Tensor, bias: Tensor) -> Routed:
        p = logits.float().softmax(-1)
        w, i = p.view(-1, GROUPS, SIZE).topk(each, dim=-1)
        starts = {
            "stepped": lambda: torch.arange(0, E, SIZE)[:, None],
            "times": lambda: torch.arange(GROUPS).view(1, GROUPS, 1) * SIZE,
            "spread": lambda: (torch.arange(GROUPS) * SIZE).view(GROUPS, 1).expand(-1, each),
            "from 0": lambda: torch.arange(0, GROUPS).mul(SIZE).unsqueeze(-1),
            "one apart": lambda: torch.arange(GROUPS)[:, None],
            "shifted": lambda: torch.arange(0, E, SIZE)[:, None] + 0,
            "of the other axis": lambda: torch.arange(0, 2 * each, 2)[None, :],
        }[first]()
        ids = (i + starts).flatten(1) if flat else (i + starts).transpose(1, 2).reshape(-1, GROUPS * each)
        return (p.gather(1, ids) if gather else w.flatten(1)), ids

    return router


def _maximum(keep: bool, biased: bool) -> Router:
    def router(logits: Tensor, bias: Tensor) -> Routed:
        p = logits.float().sigmoid()
        choice = p + bias if biased else p
        w, i = choice.view(-1, GROUPS, SIZE).max(-1, keepdim=keep)
        first = torch.arange(0, E, SIZE)
        ids = (i + first[:, None]).flatten(1) if keep else i + first
        return (p.gather(1, ids) if biased else w.flatten(1)), ids

    return router


def _masked(
    each: int = 1,
    fill: float = -INF,
    k: int = 0,
    scoring: str = "softmax",
    kept: str = "masked_fill",
    gather: bool = True,
) -> Router:
    def router(logits: Tensor, bias: Tensor) -> Routed:
        p = logits.float() if scoring == "identity" else logits.float().softmax(-1)
        scores = p + bias if "biased" in scoring else p
        by = scores.view(-1, GROUPS, SIZE)
        mask = torch.zeros_like(by, dtype=torch.bool).scatter_(2, by.topk(each, -1).indices, True).view(-1, E)
        if kept == "where":
            choice = torch.where(mask, scores, fill)
        else:
            choice = scores.masked_fill(mask if kept == "turned" else ~mask, fill)
        w, ids = choice.topk(k or GROUPS * each, -1)
        return ((scores if scoring == "biased weights" else p).gather(1, ids) if gather else w), ids

    return router


def _argmax(logits: Tensor, bias: Tensor) -> Routed:
    ids = logits.argmax(-1, keepdim=True)
    return logits.softmax(-1).gather(1, ids), ids


def _largest(logits: Tensor, bias: Tensor) -> Routed:
    return logits.softmax(-1).max(-1, keepdim=True)


def _largest_vector(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.float().softmax(-1).max(-1)
    return w.unsqueeze(-1) * 2, ids.unsqueeze(-1)


def _over_tokens(logits: Tensor, bias: Tensor) -> Routed:
    ids = logits.argmax(0, keepdim=True).expand(logits.shape[0], E)[:, :K] % E
    return logits.softmax(-1).gather(1, ids), ids


KNOWN: dict[str, tuple[Router, dict[str, Any]]] = {
    **{
        f"first experts {how}": (_per_group(1, how), {"per_group": 1})
        for how in ("stepped", "times", "spread", "from 0")
    },
    "two of each": (_per_group(2), {"per_group": 2, "k": 8}),
    "gathered": (_per_group(1, gather=True), {"per_group": 1}),
    "a maximum": (_maximum(False, False), {"ties": "first", "scoring": "sigmoid"}),
    "a maximum with its dimension": (_maximum(True, False), {"ties": "first"}),
    "a maximum of biased scores": (_maximum(False, True), {"ties": "first", "bias": True}),
    "masked": (_masked(), {"by_group": False}),
    "masked, two of each": (_masked(2), {"per_group": 2, "by_group": False}),
    "masked by where": (_masked(kept="where"), {"by_group": False}),
    "masked, its own values": (_masked(gather=False), {"by_group": False}),
}
OTHER: dict[str, tuple[Router, str]] = {
    "first experts one apart": (_per_group(1, "one apart"), "not known to be each group's first"),
    "first experts that something was added to": (_per_group(1, "shifted"), "not known to be each group's first"),
    "first experts along the other axis": (_per_group(1, "of the other axis"), "not known to be each group's first"),
    "experts of all groups in turn": (_per_group(1, flat=False), "not the indices of a top-k"),
    "masked and filled with 0": (_masked(fill=0.0), "not ruled out"),
    "masked, fewer than the groups give": (_masked(k=3), "another number"),
    "masked logits": (_masked(scoring="identity"), "could tie"),
    "masked biased scores": (_masked(scoring="biased"), "could tie"),
    "masked biased scores as weights": (_masked(scoring="biased weights"), "contain the selection bias"),
    "masked the wrong way": (_masked(kept="turned"), "not those outside the kept groups"),
}
ONE: dict[str, tuple[Router, str]] = {
    "argmax of the logits": (_argmax, "come from other scores"),
    "max": (_largest, ""),
    "max, vectors": (_largest_vector, ""),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", KNOWN)
def test_groups_of_equal_load(name: str, dtype: torch.dtype) -> None:
    router, want = KNOWN[name]
    graph, fused, said = routed(router, dtype)
    op = route_of(fused)
    assert not op.regions, said
    get = op_def("moe.route").attr
    want = {"groups": GROUPS, "per_group": 1, "by_group": True, "top_groups": 0, **want}
    assert {k: get(op, k) for k in want if k != "bias"} == {k: v for k, v in want.items() if k != "bias"}
    assert (op.operand("bias") is not None) == want.get("bias", False)
    assert equal_load_groups(op) == EqualLoad(GROUPS, SIZE, want["per_group"], want["by_group"])
    hold(router, graph, fused, dtype)


@pytest.mark.parametrize("name", OTHER)
def test_what_may_load_groups_unevenly(name: str) -> None:
    router, reason = OTHER[name]
    graph, fused, said = routed(router, torch.float32)
    for op in fused.ops:
        assert equal_load_groups(op) is None
    assert any(reason in m for m in said), said
    hold(router, graph, fused, torch.float32)


@pytest.mark.parametrize("name", ONE)
def test_the_first_of_equal_scores(name: str) -> None:
    """Logits with ties tell ``max`` from ``topk``; ``hold`` uses such."""
    router, reason = ONE[name]
    graph, fused, said = routed(router, torch.float32)
    op = route_of(fused)
    assert bool(op.regions) == bool(reason), said
    assert any(reason in m for m in said)
    if not reason:
        assert op_def("moe.route").attr(op, "ties") == "first"
    hold(router, graph, fused, torch.float32)


def test_a_maximum_over_tokens_is_no_choice_of_experts() -> None:
    _, fused, said = routed(_over_tokens, torch.float32)
    assert all(op.name != "moe.route" or op.regions for op in fused.ops), said
