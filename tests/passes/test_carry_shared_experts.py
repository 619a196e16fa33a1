"""Shared experts inside their layers, on ranks that are threads: gradients, pieces, and where they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moec.backends.reference import run_graph
from moec.backends.reference.world import run_world
from moec.ir.beside import EXPERTS, beside_experts, own_experts
from moec.ir.core import Graph, Op
from moec.ir.parser import parse_graph
from moec.ir.verifier import verify
from moec.passes import PassContext, PassManager
from moec.passes.overlap import Overlap
from moec.passes.overlap.fill import PIECES, put
from moec.passes.overlap.order import reorder
from tests.passes.numeric import in_whole_numbers, random_inputs
from tests.passes.test_overlap_plan import Costs

CASES = (Path(__file__).parent / "filecheck" / "carry-shared-experts.moe").read_text().split("// -----\n")
RANKS = 2
GATED = CASES[1]
"""A shared expert with a factor for each token."""


def made(text: str, pipeline: str) -> Graph:
    return PassManager(pipeline, repro=None).run(parse_graph(text), PassContext())


def layer(graph: Graph) -> Op:
    return next(op for op in graph.ops if op.name == "moe.parallel_experts")


def given(region: Graph, seed: int, tokens: int = 7) -> list[Tensor]:
    return in_whole_numbers(random_inputs(region, seed, {"T": tokens}))


def on_ranks(region: Graph, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
    return run_world(RANKS, {"ep": [list(range(RANKS))]}, lambda r: run_graph(region, inputs[r]))[0]


@pytest.mark.parametrize("after", ["", ",overlap{chunks=2}"])
def test_gradients_are_those_of_the_two_alone(after: str) -> None:
    whole, carried = (layer(made(GATED, f"expert-parallel{p}")) for p in ("", f",carry-shared-experts{after}"))
    region = carried.regions[1]
    own = len(whole.operands)
    inputs = [given(region, seed) for seed in range(RANKS)]
    grads = on_ranks(region, inputs)
    alone = on_ranks(whole.regions[1], [[i[0], *i[2 : 2 + own]] for i in inputs])
    for got, want in zip(grads, alone, strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=False))
    (inner,) = beside_experts(carried.regions[0])
    for i, got in zip(inputs, grads, strict=True):
        x, factor, up, down = (t.clone().requires_grad_() for t in i[2 + own :])
        out = factor * (torch.relu(x @ up[0].T) @ down[0].T)
        want = torch.autograd.grad(out, [x, factor, up, down], i[1])
        assert all(torch.equal(g, w) for g, w in zip(got[own - 1 :], want, strict=True))
    assert inner.name == "moe.experts"


def test_pieces_of_the_tokens_give_what_the_whole_gives() -> None:
    op = layer(made(GATED, "expert-parallel,carry-shared-experts"))
    inputs = [given(op.regions[0], seed) for seed in range(RANKS)]
    want = on_ranks(op.regions[0], inputs)
    for pieces in range(1, PIECES):
        region = op.regions[0].clone()
        reorder(region, put(region, ((0, pieces), (1, PIECES - pieces))))
        verify(region)
        kinds = [o.name for o in region.ops if o.name in (*EXPERTS, "comm.wait")]
        assert kinds == ["comm.wait", "moe.experts", "comm.wait", "moe.experts", "moe.experts", "comm.wait"]
        assert len(beside_experts(region)) == 2 and len(own_experts(region)) == 1
        got = on_ranks(region, inputs)
        assert all(torch.equal(g, w) for a, b in zip(got, want, strict=True) for g, w in zip(a, b, strict=True))


@dataclass(frozen=True)
class Known(Costs):
    """Costs that know what stands beside, too."""

    beside_s: float = 1e-3

    def layer_times(self, op: Op, group: str, backward: bool = False) -> Beside:
        return Beside(self.beside_s)


@dataclass(frozen=True)
class Beside:
    """So many seconds for all tokens, by their number."""

    whole: float

    def seconds(self, loads: list[float]) -> float:
        return self.whole * sum(loads) / 64


def said(costs: Costs) -> list[str]:
    graph, ctx = made(GATED, "expert-parallel,carry-shared-experts"), PassContext(cost_model=costs)
    PassManager([Overlap(tokens=64)], repro=None).run(graph, ctx)
    return [r.message for r in ctx.remarks]


def test_it_goes_where_ranks_would_wait() -> None:
    forward, backward = said(Known())
    assert "what stands beside" in forward and "ms instead of" in forward
    assert "what stands beside" in backward and "/8" not in backward, "gradients are never added up in pieces"


def test_nobody_knows_how_long_it_takes_then_it_is_first() -> None:
    assert all("what stands beside before all chunks" in message for message in said(Costs()))


def test_a_tensor_that_is_read_twice_is_left() -> None:
    square = GATED
    for wide in ("[2, 6, 4]", "[2, 4, 6]", "[4, 6, 4]", "[4, 4, 6]", "[1, 6, 4]", "[1, 4, 6]", "[R, 6]"):
        square = square.replace(wide, wide.replace("6", "4"))
    ctx = PassContext()
    graph = parse_graph(square.replace("[%su], [%sd]", "[%su], [%su]"))
    PassManager("expert-parallel,carry-shared-experts", repro=None).run(graph, ctx)
    assert [r.message for r in ctx.remarks if r.pass_name == "carry-shared-experts"] == [
        "the shared expert stays outside: it reads something twice"
    ]
