"""Routers in Triton's interpreter against the definition: the same experts, and the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.reference import run_graph
from moec.backends.triton import TritonBackend
from moec.backends.triton.kernels.route import read_router
from moec.backends.triton.route import TritonRoute
from moec.ir.core import Graph
from moec.ir.types import DTYPES
from tests.backends.cases import relative_error, route_graph

pytestmark = pytest.mark.usefixtures("interpreter")
WEIGHTS = {"f32": 2e-6, "f16": 2e-3, "bf16": 1.6e-2}
"""Largest relative difference of a weight: two units in the last place of its type."""
DEEPSEEK = {
    "scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "top2_sum", "group_fill": 0.0,
    "renormalize": True, "renorm_eps": 1e-20, "scale": 2.5,
}  # fmt: skip
ROUTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "mixtral": (8, {"k": 2, "renormalize": True}),
    "qwen3": (128, {"k": 8, "tokens_dtype": "bf16", "result": "bf16", "renormalize": True}),
    "deepseek_v3": (32, {"k": 8, "bias": True, **DEEPSEEK}),
    "groups of five": (60, {"k": 8, "groups": 12, "top_groups": 3, "scale": 16.0}),
    "masked": (24, {"k": 6, "groups": 4, "top_groups": 1, "group_fill": 0.0, "masked_weights": True}),
    "gpt_oss": (24, {"k": 4, "order": "topk_first", "tokens_dtype": "bf16", "score_dtype": DTYPES["bf16"]}),
    "all": (20, {"k": 20, "scoring": "sigmoid", "renormalize": True}),
    "logits": (40, {"k": 1, "scoring": "identity", "scale": 0.5}),
    "by group": (24, {"k": 8, "groups": 8, "per_group": 1, "by_group": True}),
    "best first of groups": (24, {"k": 6, "groups": 3, "per_group": 2, "renormalize": True}),
    "half": (12, {"k": 3, "scoring": "sqrtsoftplus", "score_dtype": DTYPES["f16"], "result": "f16"}),
    "one expert": (1, {"k": 1}),
}


def _run(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    return TritonRoute(graph, read_router(program_op(graph))).forward(inputs)


def _inputs(graph: Graph, tokens: int) -> list[Tensor]:
    """Logits all different within a row, so that no tie decides; the NaN around them is never read."""
    torch.manual_seed(tokens)
    experts = int(graph.args[0].type.shape[1])  # type: ignore[union-attr]
    room = torch.full((tokens, experts + 7), float("nan"))
    room[:, 3 : experts + 3] = torch.stack([torch.randperm(experts) for _ in range(tokens)]) / 16 - 1 if tokens else 0
    name = graph.args[0].type.dtype.name  # type: ignore[union-attr]
    logits = room.to({"f32": torch.float32, "bf16": torch.bfloat16}[name])[:, 3 : experts + 3]
    return [logits, *([torch.randn(experts) / 64] if len(graph.args) > 1 else [])]


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str) -> None:
    experts, attrs = ROUTERS[name]
    graph = route_graph(experts, **attrs)
    for tokens in (0, 1, 5, 33, 130):
        inputs = _inputs(graph, tokens)
        want_weights, want_ids = run_graph(graph, inputs)
        weights, ids = _run(graph, inputs)
        assert torch.equal(ids, want_ids), tokens
        assert weights.dtype == want_weights.dtype
        result = attrs.get("result", "f32")
        coarse = result if attrs.get("score_dtype") is None else attrs["score_dtype"].name
        assert relative_error(weights, want_weights) <= WEIGHTS[coarse], tokens


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_ids_are_in_range_whatever_the_logits() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 5, [nan, 1, 2, 3, nan], [-inf] * 5, [inf, -inf, inf, 0, nan], [0.0, -0.0, 0.0, -0.0, 0.0]]
    for attrs in ({}, {"scoring": "sigmoid"}, {"order": "topk_first"}):
        _, ids = _run(route_graph(5, k=3, **attrs), [torch.tensor(rows)])
        assert int(ids.min()) >= 0
        assert int(ids.max()) < 5
        assert all(len(set(row)) == 3 for row in ids.tolist()), "an expert is chosen twice"
    assert ids[4].tolist() == [0, 1, 2], "of equal logits the first are taken"


def test_a_router_that_is_a_region_is_left() -> None:
    region = route_graph(8, k=2)
    graph = route_graph(8, k=2, region=region)
    support = TritonBackend().supports(program_op(graph), "cpu")
    assert support.reason == "the router is a region"


def test_gradients_are_those_of_the_definition() -> None:
    graph = route_graph(8, k=2, renormalize=True)
    logits = torch.randn(5, 8)
    leaf = logits.clone().requires_grad_()
    weights, _ = run_graph(graph, [leaf])
    grad = torch.randn_like(weights)
    (want,) = torch.autograd.grad(weights, leaf, grad)
    kernel = TritonRoute(graph, read_router(program_op(graph)))
    (got,) = kernel.backward([grad, None], [logits], [True])
    assert got is not None
    assert relative_error(got, want) <= WEIGHTS["f32"]
