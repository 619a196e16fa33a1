"""Times of each form by formula: by hand, and beside a simulation of the programs that the pass writes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moec.cli.app import main
from moec.ir.parallel_semantics import chunk_sizes
from moec.parallel.formula import COUNT, ID
from moec.parallel.plan import Plan
from moec.simulate.collectives import all_gather
from moec.simulate.events import simulate
from moec.simulate.forms import FormTime, form_times, gathering
from moec.simulate.layer import layer_graphs
from moec.simulate.routing import Routing
from moec.simulate.run import Setting, run_graphs
from moec.simulate.steps import Collective, Start, Wait
from moec.simulate.topology import Topology, load_topology
from tests.parallel.test_plan import FACTS
from tests.simulate.machines import ALPHA, BANDWIDTH, machine

ROW = 64
NEAR = 0.05  # latencies of collectives whose ranks do not begin at one time


def by_form(found: list[FormTime]) -> dict[str, FormTime]:
    return {f.form: f for f in found}


def test_one_node_by_hand() -> None:
    """Two ranks with an expert each: all rows of one are chosen there, all of the other here."""
    ids = [torch.ones(10, 1, dtype=torch.int64), torch.zeros(10, 1, dtype=torch.int64)]
    found = by_form(form_times(machine(2), ids, (1, 1), ROW))
    assert sorted(found) == ["flat", "gather"], "a node alone has no form in two levels"
    flat, gather = found["flat"], found["gather"]
    assert flat.there_s == pytest.approx(2 * ALPHA + (COUNT + 10 * ROW) / BANDWIDTH)
    assert flat.back_s == gather.back_s == pytest.approx(ALPHA + 10 * ROW / BANDWIDTH)
    assert gather.there_s == pytest.approx(3 * ALPHA + (COUNT + 10 * (ROW + ID)) / BANDWIDTH)
    assert (flat.between, flat.inside) == (0.0, COUNT + 2 * 10 * ROW)


def test_two_nodes_by_hand() -> None:
    """Two nodes of two; every token has both experts of the other node, so it crosses once and is spread there."""
    made, tokens = machine(2, 2), 10
    assert made.between is not None
    slow = made.between
    ids = [torch.tensor([[2, 3] if r < 2 else [0, 1]]).expand(tokens, 2) for r in range(4)]
    found = by_form(form_times(made, ids, (1, 1, 1, 1), ROW))["hierarchical"]
    crossing, spread = COUNT + tokens * (ROW + 2 * ID), COUNT + tokens * ROW
    assert found.there_s == pytest.approx(
        3 * slow.alpha_s + crossing / slow.bytes_per_s + 2 * ALPHA + spread / BANDWIDTH
    )
    home = 2 * tokens * ROW  # a row a slot between nodes, half of them inside a node before
    assert found.back_s == pytest.approx(slow.alpha_s + home / slow.bytes_per_s + ALPHA + tokens * ROW / BANDWIDTH)
    assert found.between == crossing + home
    assert found.inside == spread + tokens * ROW


def test_nothing_to_send_costs_latencies_and_counts() -> None:
    ids = [torch.zeros(0, 2, dtype=torch.int64)] * 4
    for f in form_times(machine(2, 2), ids, (1, 1, 1, 1), ROW):
        assert 0 < f.back_s <= 4 * ALPHA
        assert f.seconds < 0.2


@pytest.mark.parametrize(
    "made", [machine(4), machine(4, 2), machine(2, 4, between=BANDWIDTH), load_topology("32xh100")]
)
def test_a_gather_is_what_its_rings_take(made: Topology) -> None:
    ranks, each = made.ranks, 40_000.0
    flows = tuple(all_gather(range(ranks), [each] * ranks, made))
    steps = [[Start(0), Wait(0)]] * ranks
    found = simulate(steps, [Collective("c", "ep", tuple(range(ranks)), flows)], made).seconds
    link = gathering(made, ranks)
    alpha = made.inside.alpha_s if made.nodes == 1 else link.alpha_s - made.device.start_s
    assert found == pytest.approx(made.device.start_s + alpha + (ranks - 1) * each / link.bytes_per_s, rel=1e-6)


@pytest.mark.parametrize(("topology", "ranks"), [("8xh100", 4), ("32xh100", 16)])
def test_forms_take_what_their_programs_take_in_a_simulation(topology: str, ranks: int) -> None:
    m = replace(FACTS, experts=16, top_k=4, hidden=1024, inner=256, element=2)
    made, routing, tokens = load_topology(topology).first(ranks), Routing("drawn"), 256
    ids = [routing.ids(r, tokens, m.top_k, m.experts) for r in range(ranks)]
    for form in form_times(made, ids, chunk_sizes(m.experts, ranks), 2 * m.hidden):
        nodes = made.nodes if form.form == "hierarchical" else 1
        plan = Plan(ep=ranks, form=form.form, nodes=nodes)
        found = run_graphs(layer_graphs(m, ranks), Setting(made, plan, routing, tokens=tokens))
        under_way = [s for s in found.timeline.spans if s.rank == 0 and s.kind == "comm"]
        assert sum(s.end - s.begin for s in under_way) == pytest.approx(form.seconds, rel=NEAR)
        sent = max(r.sent for r in found.report.ranks)
        assert sent <= form.between + form.inside <= 1.05 * sent, "busiest ranks of both links may be two"


def test_explain_tells_them(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    config = str(Path(__file__).resolve().parents[2] / "examples" / "mixtral_small.json")
    words = ["explain", config, "--random-weights", "--topology", "32xh100", "--tokens", "64"]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main((*words, *more))
        got = capsys.readouterr()
        return int(stop.value.code or 0), got.out, got.err

    made = load_topology("32xh100").first(8)
    ids = [Routing("drawn").ids(r, 64, 2, 8) for r in range(8)]
    want = [asdict(f) for f in form_times(made, ids, (1,) * 8, 64 * 2)]
    code, out, err = run("--ranks", "8", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [f | {"overlap": ""} for f in found["forms"]] == want
    assert found["forms"][0]["overlap"].startswith("stays whole: in one piece it takes")
    assert " ms" in found["micro_batches"], "both times of two micro-batches, whatever is decided"
    code, _, err = run("--ranks", "12")
    assert code == 2
    assert "12 ranks are not whole nodes of 8" in err
