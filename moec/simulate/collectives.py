"""Collectives as messages between ranks.

| collective | messages |
|---|---|
| all_to_all | each rank its part to each other one |
| all_gather, reduce_scatter inside a node | the same, the whole or a part to each other rank |
| all_gather, reduce_scatter over nodes | rings: what a rank has, it hands on to its neighbour |
| all_reduce | a reduce_scatter, then an all_gather: twice the messages' bytes |

There are as many rings as a node has ranks in the group, each through another NIC, as NCCL makes them. In any case the
bytes that all ranks together send are those of :meth:`moec.ir.comm_semantics.Call.bytes_sent`; a rank of a ring also
sends others' bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.simulate.steps import Flow
from moec.simulate.topology import Topology

Matrix = Sequence[Sequence[float]]
"""``m[s][d]``: bytes from the s-th to the d-th rank of a group."""


def all_to_all(ranks: Sequence[int], matrix: Matrix) -> list[Flow]:
    """A message for every two ranks; what a rank keeps travels nowhere."""
    return [
        Flow(s, d, float(size))
        for s, row in zip(ranks, matrix, strict=True)
        for d, size in zip(ranks, row, strict=True)
        if s != d and size
    ]


def all_gather(ranks: Sequence[int], sizes: Sequence[float], topology: Topology) -> list[Flow]:
    """Each rank's ``sizes`` bytes to all others."""
    if len({topology.node_of(r) for r in ranks}) == 1:
        return all_to_all(ranks, [[size] * len(ranks) for size in sizes])
    return _rings(ranks, sizes, topology, ahead=1)


def reduce_scatter(ranks: Sequence[int], sizes: Sequence[float], topology: Topology) -> list[Flow]:
    """All ranks' parts for each: ``sizes`` bytes each, added up on arrival or on the way."""
    if len({topology.node_of(r) for r in ranks}) == 1:
        return all_to_all(ranks, [list(sizes) for _ in ranks])
    return _rings(ranks, sizes, topology, ahead=0)


def all_reduce(ranks: Sequence[int], size: float, topology: Topology) -> list[Flow]:
    """``size`` bytes added up over all ranks."""
    parts = [size / len(ranks)] * len(ranks)
    once = reduce_scatter(ranks, parts, topology)
    return [Flow(f.source, f.to, 2 * f.bytes, 2 * f.hops) for f in once]


def hierarchical(ranks: Sequence[int], matrix: Matrix, topology: Topology) -> tuple[list[Flow], list[Flow]]:
    """An all-to-all in two: first between ranks of the same place on all nodes, then inside the nodes.

    A rank sends what a node is to get in one message, to its counterpart there, who hands it on (Tutel's 2DH,
    arXiv:2206.03382, section 4.2, in the order of DeepSeek-V3's dispatch). Bytes inside nodes are those of all slots.

    Returns:
        The messages between nodes, and those inside nodes that follow.
    """
    at = {r: i for i, r in enumerate(ranks)}
    each = topology.per_node
    between: dict[tuple[int, int], float] = {}
    inside: dict[tuple[int, int], float] = {}
    for s in ranks:
        for d in ranks:
            size = matrix[at[s]][at[d]]
            relay = topology.node_of(d) * each + s % each
            if relay != s:
                between[s, relay] = between.get((s, relay), 0.0) + size
            if relay != d:
                inside[relay, d] = inside.get((relay, d), 0.0) + size
    return [Flow(s, d, b) for (s, d), b in between.items()], [Flow(s, d, b) for (s, d), b in inside.items()]


def _rings(ranks: Sequence[int], sizes: Sequence[float], topology: Topology, ahead: int) -> list[Flow]:
    """What goes round on rings. ``ahead`` says whose part a rank does not hand on: its neighbour's (1) or its own."""
    by_node: dict[int, list[int]] = {}
    for r in ranks:
        by_node.setdefault(topology.node_of(r), []).append(r)
    size, total, count = dict(zip(ranks, sizes, strict=True)), sum(sizes), len(ranks)
    rings = min(len(each) for each in by_node.values())
    flows = []
    for turn in range(rings):
        order = [r for each in by_node.values() for r in [*each[turn:], *each[:turn]]]
        for i, r in enumerate(order):
            following = order[(i + 1) % count]
            bytes = (total - size[following if ahead else r]) / rings
            flows.append(Flow(r, following, bytes, count - 1))
    return flows
