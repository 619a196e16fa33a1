"""``fuse-routing`` where only the choice of experts is a known one: it becomes attributes, torch calls follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.ir.opdef import op_def
from moec.passes import PassContext, PassManager, parse_pipeline
from tests.passes.test_fuse_routing import E, K, Routed, Router, hold, route_of, routed


def _other_sum(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return w / w.sum(0, keepdim=True), ids


def _extra_term(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return w / (w.sum(-1, keepdim=True) + w.amax(-1, keepdim=True)), ids


def _wide_sum(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return (w / w.sum(-1, keepdim=True, dtype=torch.float64)).float(), ids


def _two_casts(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1, dtype=torch.float32).topk(K)
    return w.to(torch.bfloat16).to(torch.float32), ids


def _scale_of_a_tensor(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return w * bias[0], ids


def _scaled_before(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    w = w * 3
    return w / (w.sum(-1, keepdim=True) + 1), ids


def _narrow_scores(logits: Tensor, bias: Tensor) -> Routed:
    top, ids = logits.float().topk(K)
    return top.softmax(-1, dtype=torch.bfloat16).float(), ids


def _p_norm(logits: Tensor, bias: Tensor) -> Routed:
    """DBRX."""
    w, ids = logits.softmax(-1).topk(K)
    return w / torch.norm(w, p=2, dim=-1, keepdim=True), ids


def _scale_of_each_expert(logits: Tensor, bias: Tensor) -> Routed:
    """Gemma 4, Pangu Pro."""
    w, ids = logits.softmax(-1, dtype=torch.float32).topk(K)
    return w / w.sum(-1, keepdim=True) * bias[ids], ids


def _thirds(logits: Tensor, bias: Tensor) -> Routed:
    top, ids = logits.topk(K)
    return top.softmax(-1) / 3, ids


def _top_p(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return torch.where(w.cumsum(-1) - w < 0.5, w, 0), ids


def _skipping(logits: Tensor, bias: Tensor) -> Routed:
    """Zaya, LongCat: the last experts compute nothing."""
    scores = logits.float().softmax(-1)
    ids = (scores + bias).topk(K)[1]
    w, skip = scores.gather(1, ids), ids >= E - 2
    return w.masked_fill(skip, 0), ids.masked_fill(skip, 0)


def _over_capacity(logits: Tensor, bias: Tensor) -> Routed:
    """Switch."""
    w, ids = logits.softmax(-1).max(-1, keepdim=True)
    place = (F.one_hot(ids.squeeze(-1), E).cumsum(0) - 1).gather(1, ids)
    return torch.where(place < 3, w, 0), ids


def _noise_on_weights(logits: Tensor, bias: Tensor) -> Routed:
    w, ids = logits.softmax(-1).topk(K)
    return w + torch.rand_like(w), ids


PARTS: dict[str, tuple[Router, dict[str, Any], str]] = {
    "renormalised over tokens": (_other_sum, {"renormalize": False}, "sum, div"),
    "an extra term in the sum": (_extra_term, {"renormalize": False}, "sum, amax, add, div"),
    "a sum in f64": (_wide_sum, {"renormalize": False}, "sum, div, to"),
    "two casts": (_two_casts, {"score_dtype": "f32"}, "to"),
    "a scale that is a tensor": (_scale_of_a_tensor, {"scale": 1.0}, "select, mul"),
    "scaled before renormalising": (_scaled_before, {"scale": 3.0, "renormalize": False}, "sum, add, div"),
    "scores narrower than logits": (_narrow_scores, {"scoring": "identity"}, "softmax, to"),
    "a p-norm": (_p_norm, {"renormalize": False}, "div"),
    "a scale of each expert": (_scale_of_each_expert, {"renormalize": True}, "index, mul"),
    "a third": (_thirds, {"order": "topk_first", "scale": 1.0}, "div"),
    "top-p": (_top_p, {"renormalize": False}, "cumsum, sub, lt"),
    "experts that compute nothing": (_skipping, {"bias": True}, "masked_fill"),
    "tokens over an expert's capacity": (_over_capacity, {"ties": "first"}, "one_hot"),
}
"""A router, attributes of its choice, and calls that follow."""


@pytest.mark.parametrize("name", PARTS)
def test_the_choice_becomes_attributes_and_calls_follow(name: str) -> None:
    router, want, calls = PARTS[name]
    graph, fused, said = routed(router, torch.float32)
    op = route_of(fused)
    assert not op.regions, str(fused)
    got = {k: op_def("moe.route").attr(op, k) for k in want if k != "bias"}
    assert {k: getattr(v, "name", v) for k, v in got.items()} == {k: v for k, v in want.items() if k != "bias"}
    assert (op.operand("bias") is not None) == want.get("bias", False)
    after = next(m.split(": ")[1] for m in said if m.startswith("torch calls follow"))
    assert set(calls.split(", ")) <= set(after.split(", ")), after
    hold(router, graph, fused, torch.float32)


@pytest.mark.parametrize("name", ["a p-norm", "experts that compute nothing"])
def test_a_second_run_finds_the_router_done(name: str) -> None:
    _, fused, _ = routed(PARTS[name][0], torch.float32)
    ctx, text = PassContext(), str(fused)
    PassManager(parse_pipeline("fuse-routing"), repro=None).run(fused, ctx)
    assert str(fused) == text
    assert not ctx.remarks


def test_numbers_may_be_drawn_after_the_choice() -> None:
    _, fused, _ = routed(_noise_on_weights, torch.float32)
    names = [op.attrs.get("target", op.name) for op in fused.ops]
    assert names.index("moe.route") < next(i for i, n in enumerate(names) if "rand_like" in n)
    assert not route_of(fused).regions


def test_nothing_is_computed_twice() -> None:
    """The sum of all scores would need them beside the op, so the router is one region."""

    def router(logits: Tensor, bias: Tensor) -> Routed:
        p = logits.sigmoid()
        w, ids = p.topk(K)
        return w / p.sum(-1, keepdim=True), ids

    graph, fused, said = routed(router, torch.float32)
    assert route_of(fused).regions
    assert any("something else than their sum" in m for m in said)
    hold(router, graph, fused, torch.float32)
