"""Two micro-batches: what the pass foretells of a simulated machine is what the simulation then finds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from moec.cost.attention import Attention, core_seconds
from moec.cost.links import Link
from moec.ir.builder import Builder
from moec.ir.core import Graph
from moec.ir.types import TensorType
from moec.parallel.plan import Plan
from moec.passes import parse_pipeline
from moec.simulate.attention import Prompts, model_graphs
from moec.simulate.costs import Costs
from moec.simulate.micro_batches import dual_batch
from moec.simulate.planning import MachineCosts
from moec.simulate.routing import Routing
from moec.simulate.run import Outcome, Setting, run_graphs
from moec.simulate.topology import Topology, load_topology
from tests.parallel.test_plan import FACTS
from tests.simulate.machines import machine

RANKS = 4
SIZES = replace(FACTS, hidden=2048, inner=1024, element=2)
GROUPED = Attention(2048, 16, 4, 128, 128)
LATENT = Attention(2048, 16, 16, 192, 128, query_latent=768, latent=512, rotated=64)
NEAR = 0.02
"""What the pass leaves out: other ranks' turns, and what collectives take of the router's op beside them."""
INSTANT = Link(0.0, 1e18)


def run(a: Attention, topology: Topology, tokens: int, passes: str) -> Outcome:
    setting = Setting(topology, Plan(ep=RANKS), tokens=tokens)
    graphs = model_graphs(SIZES, a, Prompts(tokens, layers=2, micro_batches=2), RANKS)
    return run_graphs(graphs, setting, lambda: parse_pipeline(passes))


def times(text: str) -> tuple[float, float]:
    """(in turn, interleaved), seconds, as a remark tells them."""
    one, two = (float(n) / 1e3 for n in re.findall(r"([\d.e+-]+) ms", text))
    return (one, two) if "stays in turn" in text else (two, one)


def told(outcome: Outcome) -> str:
    return next(r.message for r in outcome.remarks if r.pass_name == "interleave-layers")


@pytest.mark.parametrize(
    ("a", "name", "tokens"), [(GROUPED, "8xh100", 2048), (LATENT, "8xh100", 256), (GROUPED, "cpu", 64)]
)
def test_both_times_are_those_of_the_simulation(a: Attention, name: str, tokens: int) -> None:
    made = load_topology(name)
    made = made if made.ranks >= RANKS else replace(made, per_node=RANKS, _ways={})
    plain, dual = run(a, made, tokens, ""), run(a, made, tokens, "interleave-layers")
    assert "2 times" in told(dual), "it knows the tokens from the routing"
    in_turn, interleaved = times(told(dual))
    assert in_turn == pytest.approx(plain.report.seconds, rel=NEAR)
    assert interleaved == pytest.approx(dual.report.seconds, rel=NEAR)
    assert dual.report.seconds < plain.report.seconds


@pytest.mark.parametrize("name", ["8xh100", "cpu"])
def test_it_declines_where_links_take_no_time(name: str) -> None:
    made = load_topology(name)
    made = replace(made, per_node=RANKS, inside=INSTANT, device=replace(made.device, start_s=0.0), _ways={})
    plain, asked = run(GROUPED, made, 256, ""), run(GROUPED, made, 256, "interleave-layers")
    assert "the program stays in turn: so it takes" in told(asked)
    in_turn, interleaved = times(told(asked))
    assert in_turn == pytest.approx(plain.report.seconds, rel=NEAR) and interleaved >= in_turn * 0.99
    assert asked.report.seconds == plain.report.seconds
    forced = run(GROUPED, made, 256, "interleave-layers{always=true}")
    assert forced.report.seconds >= 0.99 * plain.report.seconds, "nor was there anything to win"


def test_pieces_cost_calls_on_a_processor_alone() -> None:
    assert MachineCosts(load_topology("8xh100")).piece_seconds("ep") == 0.0
    cpu = load_topology("cpu")
    assert MachineCosts(cpu).piece_seconds("ep") == cpu.device.launch_s > 0
    slow = replace(cpu, per_node=RANKS, device=replace(cpu.device, launch_s=1.0), _ways={})
    assert "stays in turn" in told(run(GROUPED, slow, 64, "interleave-layers")), "they cost more than they hide"


def test_a_product_and_a_core_take_what_the_simulation_says() -> None:
    made = machine(4, launch_s=1e-5)
    costs, rows, inputs, outputs = MachineCosts(made), 48, 256, 512
    graph = Graph("g")
    types = [TensorType.of("bf16", *shape) for shape in ((rows, inputs), (inputs, outputs))]
    args = [graph.add_arg(t, n) for t, n in zip(types, "xw", strict=True)]
    op = Builder(graph).call("aten.mm.default", args, result_types=[TensorType.of("bf16", rows, outputs)])
    x, w, y = (torch.empty(s, dtype=torch.bfloat16) for s in ((rows, inputs), (inputs, outputs), (rows, outputs)))
    want = Costs(made.device).seconds(op.result.op, [x, w], [y])  # type: ignore[arg-type]
    assert costs.dense_seconds("ep", rows, inputs, outputs, "bf16") == pytest.approx(want)
    assert costs.dense_seconds("ep", rows, inputs, outputs, "i64") is None
    device = made.device
    for backward in (False, True):
        alone = core_seconds(1e12, 1e6, device.target, backward)
        assert costs.core_seconds("ep", 1e12, 1e6, "bf16", backward) == device.launch_s + alone


def test_what_explain_says_is_what_simulate_says() -> None:
    made = load_topology("8xh100").first(RANKS)
    text = dual_batch(SIZES, GROUPED, made, 512, Routing())
    assert text == told(run(GROUPED, made, 512, "interleave-layers"))
    instant = replace(made, inside=INSTANT, device=replace(made.device, start_s=0.0), _ways={})
    assert "stays in turn" in dual_batch(SIZES, GROUPED, instant, 512, Routing())
