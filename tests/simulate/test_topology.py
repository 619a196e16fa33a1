"""Presets: every number has a source, every two ranks a way; what cannot be read is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec.simulate.errors import SimulationError
from moec.simulate.events import simulate
from moec.simulate.steps import Collective, Flow, Start, Wait
from moec.simulate.topology import PRESETS, known_topologies, load_topology
from tests.simulate.machines import ALPHA, BANDWIDTH, machine

DATA = json.loads(PRESETS.read_text())


def test_the_presets_that_are_promised() -> None:
    ranks = {name: load_topology(name).ranks for name in known_topologies()}
    assert {"8xh100": 8, "32xh100": 32, "64xh100": 64, "cloudmatrix384": 768}.items() <= ranks.items()
    assert ranks["cpu"] >= 2


def test_every_number_has_a_source() -> None:
    numbers = [n for kind in ("devices", "links") for d in DATA[kind].values() for n in d.values()]
    assert len([n for n in numbers if isinstance(n, dict)]) > 20
    for n in numbers:
        assert not isinstance(n, (int, float))
        if isinstance(n, dict):
            assert len(n["source"]) > 5


@pytest.mark.parametrize("name", ["8xh100", "64xh100"])
def test_ways_lead_over_links_of_the_right_tiers(name: str) -> None:
    made = load_topology(name)
    tiers = {made.graph.edges[e]["tier"] for e in made.links}
    assert tiers == ({"inside"} if made.nodes == 1 else {"inside", "nic", "between"})
    near = made.way(0, 1)
    assert [made.graph.edges[made.links[i]]["tier"] for i in near.links] == ["inside", "inside"]
    assert near.alpha_s == pytest.approx(made.inside.alpha_s)
    if made.between is not None:
        far = made.way(0, made.ranks - 1)
        assert [made.graph.edges[made.links[i]]["tier"] for i in far.links] == ["nic", "between", "between", "nic"]
        assert far.alpha_s == pytest.approx(made.between.alpha_s)
    back = [made.links[i] for i in made.way(1, 0).links]
    assert not set(back) & {made.links[i] for i in near.links}  # full duplex: the way back is other edges


def test_rows_that_stay_where_a_kernel_moves_all_alike_share_the_ranks_link() -> None:
    """To itself a rank's way is to the switch and back; with a message to another rank its link carries both."""
    made = machine(4, 2)
    assert made.way(1, 1).links == (made.links.index(("rank 1", "switch 0")), made.links.index(("switch 0", "rank 1")))
    assert made.way(1, 1).alpha_s == pytest.approx(made.inside.alpha_s)
    flows = (Flow(1, 1, 3e5), Flow(1, 0, 5e5))
    steps = [[Start(0), Wait(0)]] * 2
    both, alone = (simulate(steps, [Collective("c", "ep", (0, 1), f)], made).seconds for f in (flows, flows[1:]))
    assert alone == pytest.approx(ALPHA + 5e5 / BANDWIDTH)
    assert both == pytest.approx(ALPHA + 8e5 / BANDWIDTH)


def test_the_first_ranks() -> None:
    whole = load_topology("64xh100")
    assert (whole.first(16).nodes, whole.first(16).per_node) == (2, 8)
    assert (whole.first(4).nodes, whole.first(4).per_node) == (1, 4)
    with pytest.raises(SimulationError, match="12 ranks are not whole nodes of 8"):
        whole.first(12)
    with pytest.raises(
        SimulationError, match="take fewer ranks, or a larger topology: 256xh800, 256xa100, cloudmatrix384"
    ):
        whole.first(100)


def test_an_unknown_name() -> None:
    with pytest.raises(SimulationError, match="unknown topology '8xh10'; did you mean '8xh100'"):
        load_topology("8xh10")


def write(path: Path, change: Any = None, **topologies: Any) -> str:
    data = json.loads(PRESETS.read_text())
    data["topologies"] = {name: dict(t) for name, t in topologies.items()}
    if change is not None:
        change(data)
    path.write_text(json.dumps(data))
    return str(path)


MINE = {"about": "mine", "device": "h100", "nodes": 3, "per_node": 2, "inside": "nvlink4", "between": "ndr400"}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    assert load_topology(write(tmp_path / "t.json", mine=MINE)).ranks == 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(version=2), "is no moec-topologies of version 1"),
        (lambda d: d.pop("links"), "lacks links"),
        (lambda d: d["topologies"].update(b=MINE), "holds 2 topologies, not one"),
        (lambda d: d["topologies"]["mine"].pop("nodes"), "lacks 'nodes'"),
        (lambda d: d["topologies"]["mine"].update(inside="rope"), "lacks 'rope'"),
        (lambda d: d["topologies"]["mine"].update(between=None), "3 nodes need links between them"),
        (lambda d: d["links"]["nvlink4"]["alpha_s"].update(value=-1), "a value that cannot be"),
        (lambda d: d["links"]["nvlink4"]["alpha_s"].update(source=""), "and its source belong"),
        (lambda d: d["devices"]["h100"].update(target="cuda:sm9000"), "unknown target"),
        (lambda d: d["devices"]["h100"]["comm_units"].update(value=1.5), "cannot take 1.5 of all units"),
    ],
)
def test_a_file_that_is_wrong(change: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=says):
        load_topology(write(tmp_path / "t.json", change, mine=MINE))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="cannot be read"):
        load_topology(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("no")
    with pytest.raises(SimulationError, match="cannot be read"):
        load_topology(str(tmp_path / "text.json"))


def test_a_machine_without_a_way() -> None:
    made = machine(2)
    made.graph.remove_edge("rank 0", "switch 0")
    with pytest.raises(SimulationError, match="no way leads from rank 0 to rank 1"):
        made.way(0, 1)
