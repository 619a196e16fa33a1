"""Machines to simulate on: a graph of devices, NICs and switches, its links directed, each with latency and bandwidth.

A node's devices hang on one switch. Where there are several nodes, every device has a NIC, and all NICs hang on one
fabric that is never the bottleneck (a fat tree without oversubscription). A link and its way back are two edges: links
are full duplex. The latency of a kind of links is that from device to device; each end of the way bears half of it.

Presets lie in ``topologies.json``, every number beside its source; bandwidths there are data sheets', times one
efficiency for each kind of links.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx

from moec.cost.links import Link
from moec.cost.machine import MachineProfile
from moec.ir.errors import nearest
from moec.simulate.errors import SimulationError
from moec.targets import Target, TargetError, parse_target

FORMAT, VERSION = "moec-topologies", 1
PRESETS = Path(__file__).with_name("topologies.json")


@dataclass(frozen=True)
class Device:
    """What one rank computes with.

    Attributes:
        target: Peaks; the memory bandwidth is what streams reach.
        launch_s: What every op costs beside its work.
        start_s: What every collective costs before its first message.
        comm_units: Part of its units (multiprocessors, cores) that a collective holds while it is under way. Arithmetic
            then takes that much longer; what memory binds does not.
        machine: A measured processor, whose curves hold for experts; one rank is one of its cores.
    """

    target: Target
    launch_s: float
    start_s: float
    comm_units: float = 0.0
    machine: MachineProfile | None = None

    @property
    def piece_s(self) -> float:
        """What an op of a layer in pieces costs beside what it runs: a call on a processor, on others nothing."""
        return self.launch_s if self.target.kind == "cpu" else 0.0

    @property
    def beside_collective(self) -> Target:
        """What is left of the device while a collective is under way."""
        left = 1.0 - self.comm_units
        return replace(self.target, flops=tuple((dtype, rate * left) for dtype, rate in self.target.flops))


@dataclass(frozen=True)
class Topology:
    """Ranks and what lies between them.

    Attributes:
        name: As the user calls it.
        about: One line.
        device: Of every rank.
        nodes, per_node: Ranks of a node are neighbours.
        inside: Links of a node.
        between: Links between nodes; None where there is one node.
    """

    name: str
    about: str
    device: Device
    nodes: int
    per_node: int
    inside: Link
    between: Link | None = None
    _ways: dict[int, dict[int, Way]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.per_node < 1 or (self.nodes > 1 and self.between is None):
            raise SimulationError(f"topology {self.name!r}: {self.nodes} nodes need links between them")

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def first(self, ranks: int) -> Topology:
        """The same with its first ``ranks`` ranks alone.

        Raises:
            SimulationError: It has fewer, or they are not whole nodes.
        """
        if ranks > self.ranks:
            raise SimulationError(
                f"{ranks} ranks do not fit topology {self.name!r}, which has {self.ranks}",
                hint="take fewer ranks, or a larger topology: " + ", ".join(larger(ranks)),
            )
        if ranks > self.per_node and ranks % self.per_node:
            raise SimulationError(f"{ranks} ranks are not whole nodes of {self.per_node} of topology {self.name!r}")
        nodes, per_node = max(1, ranks // self.per_node), min(ranks, self.per_node)
        return replace(self, nodes=nodes, per_node=per_node, _ways={})

    def node_of(self, rank: int) -> int:
        return rank // self.per_node

    @cached_property
    def graph(self) -> Any:
        """A ``networkx.DiGraph``; nodes have a ``tier`` (device, nic, switch), edges ``tier``, ``alpha_s`` and
        ``bytes_per_s``."""
        made = nx.DiGraph()

        def tie(a: str, b: str, tier: str, link: Link, alpha: float) -> None:
            for ends in ((a, b), (b, a)):
                made.add_edge(*ends, tier=tier, alpha_s=alpha, bytes_per_s=link.bytes_per_s)

        for rank in range(self.ranks):
            node = self.node_of(rank)
            made.add_node(f"rank {rank}", tier="device")
            made.add_node(f"switch {node}", tier="switch")
            tie(f"rank {rank}", f"switch {node}", "inside", self.inside, self.inside.alpha_s / 2)
            if self.nodes > 1:
                assert self.between is not None
                made.add_node(f"nic {rank}", tier="nic")
                made.add_node("fabric", tier="switch")
                tie(f"rank {rank}", f"nic {rank}", "nic", self.between, 0.0)
                tie(f"nic {rank}", "fabric", "between", self.between, self.between.alpha_s / 2)
        return made

    @cached_property
    def links(self) -> list[tuple[str, str]]:
        """All directed edges; ways speak of them by their place here."""
        return list(self.graph.edges)

    @cached_property
    def _place(self) -> dict[tuple[str, str], int]:
        return {edge: i for i, edge in enumerate(self.links)}

    def way(self, source: int, to: int) -> Way:
        """The shortest way from one rank to another; to itself, over its link to the switch and back.

        That is what rows cost that stay on their rank where a kernel moves all rows alike, through buffers.

        Raises:
            SimulationError: The graph does not join them.
        """
        if source not in self._ways:
            found = nx.single_source_shortest_path(self.graph, f"rank {source}")
            self._ways[source] = {
                int(name.split()[1]): self._way_along(nodes)
                for name, nodes in found.items()
                if name.startswith("rank ") and len(nodes) > 1
            }
            switch = f"switch {self.node_of(source)}"
            if self.graph.has_edge(f"rank {source}", switch):
                self._ways[source][source] = self._way_along([f"rank {source}", switch, f"rank {source}"])
        try:
            return self._ways[source][to]
        except KeyError:
            raise SimulationError(f"no way leads from rank {source} to rank {to} of {self.name!r}") from None

    def _way_along(self, nodes: list[str]) -> Way:
        edges = list(pairwise(nodes))
        data = [self.graph.edges[e] for e in edges]
        return Way(tuple(self._place[e] for e in edges), sum(d["alpha_s"] for d in data))


@dataclass(frozen=True)
class Way:
    """How a message travels: places of its links in ``Topology.links``, and the latency of all of them."""

    links: tuple[int, ...]
    alpha_s: float


def load_topology(text: str) -> Topology:
    """The preset of that name, this machine (``here``), or the only topology of a file in the format of the presets.

    Raises:
        SimulationError: No such preset (the nearest are named), a file that cannot be read, or no measurement.
    """
    from moec.simulate.here import HERE, here  # which makes topologies

    if text == HERE:
        return here()
    if text.endswith(".json"):
        data = _read(Path(text))
        if len(data["topologies"]) != 1:
            raise SimulationError(f"{text} holds {len(data['topologies'])} topologies, not one")
        return _topology(next(iter(data["topologies"])), data, text)
    data = _read(PRESETS)
    if text not in data["topologies"]:
        raise SimulationError(
            f"unknown topology {text!r}; {nearest(text, [*data['topologies'], HERE])}",
            hint=f"topologies: {', '.join(data['topologies'])}, {HERE} for this machine, or a .json file",
        )
    return _topology(text, data, str(PRESETS.name))


def known_topologies() -> list[str]:
    """Names of the presets."""
    return list(_read(PRESETS)["topologies"])


def larger(ranks: int) -> list[str]:
    """Presets that have so many ranks."""
    found = _read(PRESETS)["topologies"]
    return [name for name, t in found.items() if t["nodes"] * t["per_node"] >= ranks] or ["none"]


def _read(path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SimulationError(f"the topology {path} cannot be read: {e}") from e
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise SimulationError(f"{path} is no {FORMAT} of version {VERSION}")
    missing = [part for part in ("devices", "links", "topologies") if not isinstance(data.get(part), dict)]
    if missing:
        raise SimulationError(f"{path} lacks {', '.join(missing)}")
    return data


def _topology(name: str, data: Mapping[str, Any], file: str) -> Topology:
    try:
        t = data["topologies"][name]
        between = None if t["between"] is None else _link(data["links"][t["between"]])
        d = data["devices"][t["device"]]
        target = parse_target(d["target"])
        bandwidth = _number(d["memory_bandwidth"]) if "memory_bandwidth" in d else target.memory_bandwidth
        streams = replace(target, memory_bandwidth=bandwidth * _number(d["memory_efficiency"]))
        units = _number(d["comm_units"]) if "comm_units" in d else 0.0
        if units >= 1:
            raise ValueError(f"a collective cannot take {units:g} of all units")
        device = Device(streams, _number(d["launch_s"]), _number(d["start_s"]), units)
        inside = _link(data["links"][t["inside"]])
        return Topology(name, str(t["about"]), device, int(t["nodes"]), int(t["per_node"]), inside, between)
    except KeyError as e:
        raise SimulationError(f"{file}: topology {name!r} lacks {e}") from e
    except (TypeError, ValueError, TargetError) as e:
        raise SimulationError(f"{file}: topology {name!r} holds a value that cannot be: {e}") from e


def _link(data: Mapping[str, Any]) -> Link:
    return Link(_number(data["alpha_s"]), _number(data["bytes_per_s"]) * _number(data["efficiency"]))


def _number(entry: Mapping[str, Any]) -> float:
    """A number beside its source.

    Raises:
        ValueError: It has no source, or is no number from 0 up.
    """
    value = float(entry["value"])
    if not entry["source"] or not 0 <= value < float("inf"):
        raise ValueError(f"{dict(entry)!r} where a number from 0 up and its source belong")
    return value
