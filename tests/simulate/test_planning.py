"""What planning passes are told of the simulated machine is what the simulation then finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec.cost import LayerShape
from moec.parallel.plan import Plan
from moec.passes import parse_pipeline
from moec.simulate.collectives import all_to_all
from moec.simulate.costs import Costs, rows_of_experts
from moec.simulate.events import simulate
from moec.simulate.layer import layer_graphs
from moec.simulate.planning import MachineCosts, RoutedRows
from moec.simulate.routing import Routing
from moec.simulate.run import Outcome, Setting, run_graphs
from moec.simulate.steps import Collective, Compute, Start, Step, Wait
from moec.simulate.topology import Topology, load_topology
from tests.parallel.layers import Layer
from tests.parallel.test_plan import FACTS
from tests.simulate.machines import machine

STARTED = {"moe.arrivals", "aten.ones_like.default", "aten.index_select.default", "aten.reshape.default"}
"""Ops that a layer has once a chunk, or as often however it is cut, and that start something."""


@pytest.mark.parametrize("made", [machine(4, start_s=1e-4), machine(4, 2, start_s=1e-4), load_topology("32xh100")])
def test_transport_is_the_time_of_a_balanced_all_to_all(made: Topology) -> None:
    ranks, each = made.ranks, 50_000.0
    link = MachineCosts(made).transport("ep", ranks)
    assert link is not None
    flows = tuple(all_to_all(range(ranks), [[each] * ranks] * ranks))
    steps = [[Start(0), Wait(0)]] * ranks
    found = simulate(steps, [Collective("c", "ep", tuple(range(ranks)), flows)], made).seconds
    assert link.seconds(each * (ranks - 1)) == pytest.approx(found, rel=1e-6)


def test_parts_of_an_axis() -> None:
    made = machine(4, 2)
    costs = MachineCosts(made)
    local, node = costs.transport("ep.local", 4), costs.transport("ep.node", 2)
    assert local is not None
    assert node is not None
    assert local.bytes_per_s == made.inside.bytes_per_s
    assert made.between is not None
    assert node.bytes_per_s == made.between.bytes_per_s
    assert costs.transport("ep", 1) is None


def test_expert_times_are_those_of_the_simulation() -> None:
    layer = Layer(4, 8, hidden=64, inner=128)
    op = layer.spread(0, "expert-parallel").ops[0]
    made = machine(4)
    inner = next(o for o in op.regions[0].ops if o.name == "moe.experts")
    ids = torch.tensor([[0], [0], [1]])
    values = [torch.empty(3, 64), ids, torch.empty(3, 1), torch.empty(2, 256, 64), torch.empty(2, 64, 128)]
    curve = MachineCosts(made).expert_times(op)
    assert curve is not None
    assert Costs(made.device).seconds(inner, values, [torch.empty(3, 64)]) == curve.seconds(rows_of_experts(ids, 2))
    backward = MachineCosts(made).expert_times(op, backward=True)
    assert backward is not None
    assert backward.expert_seconds(512.0) > 2 * curve.expert_seconds(512.0)


def test_a_chunk_costs_the_starts_of_its_ops() -> None:
    made = machine(4, launch_s=1e-5)
    costs, layer = MachineCosts(made), Layer(4, 8, hidden=64, inner=128)
    op = layer.spread(0, "expert-parallel").ops[0]
    started: dict[tuple[int, int], int] = {}
    for chunks in (2, 3):
        cut = Layer(4, 12, hidden=64, inner=128).spread(0, f"expert-parallel,overlap{{chunks={chunks}}}").ops[0]
        for place in (0, 1):
            names = [(o.name, o.attrs.get("target", "")) for o in cut.regions[place].ops]
            started[chunks, place] = sum(n in STARTED or t in STARTED for n, t in names)
    for place in (0, 1):
        each = started[3, place] - started[2, place]
        assert each > 0
        assert costs.chunk_seconds(op, place, "experts") == each * made.device.launch_s
    assert costs.chunk_seconds(op, 0, "tokens") > costs.chunk_seconds(op, 0, "experts"), "the whole program again"
    gather = layer.spread(0, "expert-parallel{form=gather}").ops[0]
    assert costs.chunk_seconds(gather, 0, "experts") == 0.0, "it is not cut so"


def test_rows_are_those_of_the_routing() -> None:
    routing = Routing.parse("zipf:1")
    rows = RoutedRows(routing, 32, 2).rows("model.layers.0.mlp", 4, 8)
    assert rows is not None
    assert [sum(r) for r in rows] == [64.0] * 4
    assert rows[1] == torch.bincount(routing.ids(1, 32, 2, 8).flatten(), minlength=8).tolist()
    assert RoutedRows(routing, 32, 9).rows("", 4, 8) is None
    assert "nothing shows clusters" in RoutedRows(routing, 32, 2).least_saving(8, 2, 2, ())


def test_arithmetic_beside_a_collective_has_fewer_units_and_the_same_memory() -> None:
    device = replace(machine(4).device, comm_units=0.25)
    costs = Costs(device)
    assert costs.beside is not None
    assert Costs(machine(4).device).beside is None
    shape = LayerShape(4096, 4096, 4096, experts=1, top_k=1, dtype="bf16")
    alone, slowed = costs.curve_of(shape), costs.beside.curve_of(shape)
    written = 8192 * 2 * (4096 + 4096) / device.target.memory_bandwidth  # results of both GEMMs
    assert slowed.expert_seconds(8192) - written == pytest.approx((alone.expert_seconds(8192) - written) / 0.75)
    assert slowed.expert_seconds(1) == alone.expert_seconds(1), "one row is bound by reading weights"


def test_a_collective_makes_experts_beside_it_end_later_by_its_part_of_the_units() -> None:
    """What the pass is told is what the simulation finds, where experts last at least as long as the collective."""
    plain, units = machine(4), 0.25
    made = replace(plain, device=replace(plain.device, comm_units=units))
    assert MachineCosts(plain).burden("ep") is None
    taken = MachineCosts(made).burden("ep")
    assert taken is not None
    each, alone = 20_000.0, 0.5
    moved = all_to_all(range(4), [[each] * 4] * 4)
    steps: list[Step] = [Start(0), Compute("experts", alone, alone / (1 - units)), Wait(0)]
    found = simulate([steps] * 4, [Collective("c", "ep", (0, 1, 2, 3), tuple(moved))], made).seconds
    assert found == pytest.approx(alone + taken.seconds(3 * each))
    assert taken.seconds(3 * each, 2) - taken.seconds(3 * each) == pytest.approx(units * made.inside.alpha_s)


def test_schedules_are_predicted_nearer_when_units_are_counted() -> None:
    """The step that the pass foretells, with what collectives take and without, beside the simulated one."""
    facts = replace(FACTS, hidden=2048, inner=768, experts=64, top_k=8, element=2)
    setting = Setting(load_topology("8xh100"), Plan(ep=4), tokens=2048)

    def told(outcome: Outcome) -> float:
        message = next(r.message for r in outcome.remarks if "the forward in" in r.message)
        return float(message.split(": ")[1].split(" ms")[0]) / 1e3

    counted = run_graphs(layer_graphs(facts, 4), setting, lambda: parse_pipeline("overlap"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MachineCosts, "burden", lambda *_: None)
        uncounted = run_graphs(layer_graphs(facts, 4), setting, lambda: parse_pipeline("overlap"))
    assert counted.report.seconds <= uncounted.report.seconds * 1.01
    assert told(counted) / counted.report.seconds > told(uncounted) / uncounted.report.seconds
