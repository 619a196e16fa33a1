"""What is computed while rows travel is hidden in a simulation, and costs what it costs outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moec.ir.parser import parse_graph
from moec.parallel.plan import Plan
from moec.passes import parse_pipeline
from moec.simulate.layer import layer_graphs
from moec.simulate.run import Outcome, Setting, run_graphs
from moec.simulate.topology import load_topology
from tests.parallel.test_plan import FACTS

RANKS, TOKENS = 4, 256
FACTS_SHARED = replace(FACTS, hidden=2048, inner=1024, shared=2048, element=2)
DUAL = (Path(__file__).parents[1] / "passes" / "filecheck" / "interleave-layers.moe").read_text().split("// -----\n")[0]


def run(passes: str, training: bool = False) -> Outcome:
    setting = Setting(load_topology("8xh100"), Plan(ep=RANKS), tokens=TOKENS, training=training)
    return run_graphs(layer_graphs(FACTS_SHARED, RANKS), setting, lambda: parse_pipeline(passes))


@pytest.mark.parametrize("training", [False, True])
def test_a_shared_expert_is_computed_while_rows_travel(training: bool) -> None:
    outside = run("expert-parallel,overlap", training).report
    inside = run("expert-parallel,carry-shared-experts,overlap", training)
    assert any("a shared expert runs while rows travel" in r.message for r in inside.remarks)
    assert inside.report.seconds < outside.seconds and inside.report.exposed_s < outside.exposed_s
    assert [r.sent for r in inside.report.ranks] == [r.sent for r in outside.ranks], "no byte more travels"


def test_without_chunks_it_hides_as_much_as_it_takes() -> None:
    apart, inside = run("expert-parallel").report, run("expert-parallel,carry-shared-experts").report
    assert inside.compute_s >= apart.compute_s, "a collective under way holds compute units"
    assert inside.seconds < apart.seconds and inside.exposed_s < apart.exposed_s


def test_a_plan_says_both() -> None:
    setting = Setting(load_topology("8xh100"), Plan(ep=RANKS, overlap="auto"), tokens=TOKENS)
    planned = run_graphs(layer_graphs(FACTS_SHARED, RANKS), setting).report
    assert planned.seconds == run("expert-parallel,carry-shared-experts,overlap{rank=-1}").report.seconds


def test_another_micro_batch_runs_while_rows_travel() -> None:
    wide = DUAL.replace("[T, 4]", "[T, 2048]").replace("[4, 4]", "[2048, 2048]")
    for old, new in (("2, 6, 4", "2, 1024, 2048"), ("2, 4, 6", "2, 2048, 1024"), ("4, 6, 4", "4, 1024, 2048"),
                     ("4, 4, 6", "4, 2048, 1024"), ("[R, 6]", "[R, 1024]")):  # fmt: skip
        wide = wide.replace(old, new)
    setting = Setting(load_topology("8xh100"), tokens=TOKENS)
    graphs = [parse_graph(wide)]
    one, dual = (
        run_graphs(graphs, setting, lambda p=p: parse_pipeline(p)).report  # type: ignore[misc]
        for p in ("expert-parallel", "expert-parallel,interleave-layers")
    )
    assert dual.seconds < one.seconds and dual.exposed_s < one.exposed_s
    assert dual.compute_s >= one.compute_s, "a collective under way holds compute units"
    assert [r.sent for r in dual.ranks] == [r.sent for r in one.ranks]
