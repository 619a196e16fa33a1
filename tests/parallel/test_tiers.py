"""Four processes as two nodes of two: links measured apart, a schedule that all choose, and the bits of no overlap."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

import moec
from moec.backends.base import Artifact
from moec.backends.cpu.build import compiler
from moec.backends.registry import get_backend
from moec.cost.links import Link
from moec.ir.beside import EXPERTS
from moec.op_costs import op_costs
from moec.parallel.costs import costs_of, keep_costs
from moec.passes import PassContext, PassManager
from moec.passes.overlap import Overlap
from moec.runtime.programs import program_graph
from tests.compile.blocks import Block, Layers
from tests.parallel.layers import Layer
from tests.support.gloo import on_gloo
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow  # four processes start, and a kernel is built

RANKS = 4
DEADLINE = 240.0
TARGET = "cpu:avx2"
LAYER = Layer(RANKS, experts=8, top_k=3, nodes=2, hidden=19, inner=13)
HISTOGRAMS = ("spread", "one_expert", "empty_ranks")
FORM = "expert-parallel{form=hierarchical,nodes=<nodes>,rank=<rank>}"
PLAN = "ep=4,nodes=2,form=hierarchical,overlap=auto,step=64"


def measured() -> dict[str, Any]:
    """What the ranks agreed on."""
    moec.parallelize(Layers(Block()), None, PLAN)
    found = {name: costs_of(name) for name in ("ep", "ep.node", "ep.local")}
    assert all(c is not None for c in found.values())
    return {name: (c.link, c.chunks) for name, c in found.items() if c is not None}


def bits(rank: int) -> dict[str, Any]:
    """Forwards of one layer whole and as the pass cuts it for links that are slow on both tiers."""
    for name in ("ep.node", "ep.local"):
        known = costs_of(name)
        assert known is not None
        keep_costs(name, replace(known, link=Link(0.0, 2e3)))
    kernels, said = {}, list[str]()
    for name in ("whole", "cut"):
        graph, ctx = LAYER.spread(rank, FORM), PassContext(cost_model=op_costs(TARGET))
        if name == "cut":
            PassManager([Overlap(tokens=64)], repro=None).run(graph, ctx)
            said = [r.message for r in ctx.remarks]
        op = graph.ops[0]
        op.attrs["backend"] = "cpu"
        count = sum(o.name in EXPERTS for o in op.regions[0].ops)
        kernels[name] = get_backend("distributed").load(Artifact("distributed", TARGET, program_graph(op))), count
    same = []
    for histogram in HISTOGRAMS:
        inputs = [*LAYER.tokens(histogram)[rank], *LAYER.share(rank, LAYER.weights())]
        (want,), (got,) = (kernels[name][0].forward(inputs) for name in ("whole", "cut"))
        same.append(torch.equal(want, got))
    return {"same": same, "counts": [count for _, count in kernels.values()], "said": said}


def main(rank: int, folder: str) -> None:
    on_gloo(
        rank, folder, RANKS, lambda: {"measured": measured()} | ({"bits": bits(rank)} if compiler() is not None else {})
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = run_processes(main, RANKS, tmp_path_factory.mktemp("tiers"), DEADLINE)
    for each in found:
        assert "error" not in each, each["error"]
    return found


def test_all_ranks_plan_with_the_same_links_of_both_tiers(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["measured"]
    assert all(r["measured"] == first for r in ranks)
    for part in (".node", ".local"):
        link, chunks = first[f"ep{part}"]
        assert 0 < link.alpha_s < 1 and 1e6 < link.bytes_per_s < 1e12
        assert chunks.tokens.all >= chunks.tokens.front >= 0 and chunks.tokens.all > 0
        assert chunks.tokens == first["ep"][1].tokens, "a chunk's calls are those of this form"


def test_chunks_that_the_pass_chose_have_the_bits_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    for rank in ranks:
        found = rank["bits"]
        assert found["counts"][0] == 1 < found["counts"][1] == ranks[0]["bits"]["counts"][1]
        assert found["said"] == ranks[0]["bits"]["said"] and "chunks of tokens" in found["said"][0]
        assert all(found["same"])
