"""Small machines for the simulator's tests, with round numbers."""

from __future__ import annotations

from dataclasses import replace

from moec.cost.links import Link
from moec.simulate.topology import Device, Topology
from moec.targets import parse_target

ALPHA, BANDWIDTH = 1e-3, 1e6


def machine(
    per_node: int = 4, nodes: int = 1, *, start_s: float = 0.0, launch_s: float = 0.0, between: float = BANDWIDTH / 4
) -> Topology:
    """Nodes on a switch each: 1 ms of latency, 1 MB/s; a quarter of that and 2 ms between nodes."""
    device = Device(replace(parse_target("cuda:sm90"), ranks=1), launch_s, start_s)
    return Topology(
        "small", "for tests", device, nodes, per_node, Link(ALPHA, BANDWIDTH),
        Link(2 * ALPHA, between) if nodes > 1 else None,
    )  # fmt: skip
