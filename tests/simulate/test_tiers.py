"""A layer over nodes, simulated whole and as ``overlap`` cuts it: the pass foretells what the simulation finds."""

from __future__ import annotations

import pytest

from moec.parallel.plan import Plan
from moec.parallel.planner import ModelFacts
from moec.passes import parse_pipeline
from moec.simulate.chosen import chosen_chunks
from moec.simulate.layer import layer_graphs
from moec.simulate.routing import Routing
from moec.simulate.run import Outcome, Setting, run_graphs
from moec.simulate.topology import load_topology

FACTS = ModelFacts(
    experts=32, top_k=4, layers=2, hidden=4096, inner=1536, heads=4, kv_heads=2, attention_layers=2, element=2,
    expert_bytes=800_000, attention_bytes=100_000, other_bytes=50_000,
)  # fmt: skip
NEAR = 0.1
"""Ops that sort and copy rows are in the simulation alone; in the pass's times all ranks wait for the slowest."""


def step(pipeline: str, form: str = "hierarchical", tokens: int = 1024) -> Outcome:
    plan = Plan.parse(f"ep=32,nodes=4,form={form}")
    setting = Setting(load_topology("32xh100"), plan, Routing.parse("uniform"), tokens)
    return run_graphs(layer_graphs(FACTS, 32), setting, lambda: parse_pipeline(pipeline))


def test_what_is_chosen_is_told_without_a_simulation() -> None:
    machine, routing = load_topology("32xh100"), Routing.parse("uniform")
    said = chosen_chunks(machine, FACTS, "hierarchical", 1024, routing)
    assert " chunks of tokens (" in said and "ms instead of" in said
    assert "is not predicted" in chosen_chunks(machine, FACTS, "gather", 1024, routing)


@pytest.mark.slow  # 32 ranks are traced three times
def test_four_nodes_of_eight_gpus() -> None:
    whole, two, ours = (step(p) for p in ("", "overlap{policy=two}", "overlap"))
    said = next(r.message for r in ours.remarks if "the forward in" in r.message)
    told, before = (float(part.split(" ms")[0]) / 1e3 for part in said.split(": ")[1].split("instead of "))
    assert "chunks of tokens" in said
    assert told == pytest.approx(ours.report.seconds, rel=NEAR)
    assert before == pytest.approx(whole.report.seconds, rel=NEAR)
    assert ours.report.seconds < two.report.seconds < whole.report.seconds
    assert any("the backward stays whole: a token goes to a node once" in r.message for r in ours.remarks)


def test_few_tokens_stay_whole() -> None:
    remarks = [r.message for r in step("overlap", tokens=64).remarks]
    assert any("the forward stays whole: in one piece it takes" in r for r in remarks)
