"""What the simulator says of collectives and of products: the smaller rows of published.json.

A kernel that takes its rows as they come, or sends them as they are done, is a pipeline of equal parts whose collective
starts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moec.cost.products import EFFICIENCY, TILE, Product
from moec.cost.products import product_seconds as seconds_of
from moec.ir.parallel_semantics import chunk_sizes, owners
from moec.simulate import Routing, Topology, simulate
from moec.simulate.collectives import all_gather, all_to_all, reduce_scatter
from moec.simulate.steps import Collective, Compute, Flow, Start, Step, Wait
from moec.targets import Target


def one_start(topology: Topology) -> Topology:
    """The machine of one kernel whose parts need no start of their own."""
    return replace(topology, device=replace(topology.device, start_s=0.0), _ways={})


def alone(topology: Topology, ranks: int, flows: Sequence[Flow]) -> float:
    """Seconds of one collective."""
    collective = Collective("one", "ep", tuple(range(ranks)), tuple(flows))
    return simulate([[Start(0), Wait(0)]] * ranks, [collective], topology).seconds


def product_seconds(topology: Topology, p: dict[str, Any], rows: float, target: Target | None = None) -> float:
    """Of one GEMM of ``rows`` rows dealt out to ``groups`` experts.

    Args:
        topology: Its device's launch time counts.
        p: ``groups``, ``inputs``, ``outputs``; ``dtype`` where it is not bf16, ``flops`` where a row gives the peak,
            ``item`` and ``weight_item``, bytes of an element of the inputs and of the weights.
        rows: In all.
        target: What is left of the device; all of it by default.
    """
    target, item = target or topology.device.target, p.get("item", 2)
    left = target.flops_per_s("bf16") / topology.device.target.flops_per_s("bf16")
    rate = p["flops"] * left if "flops" in p else target.flops_per_s(p.get("dtype", "bf16"))
    sizes = Product(
        rows / p["groups"], p["inputs"], p["outputs"], p["groups"], item, p.get("weight_item", item), max(2, item)
    )
    return topology.device.launch_s + seconds_of(sizes, target, rate)


def looped_product_seconds(topology: Topology, p: dict[str, Any]) -> float:
    """A loop over experts that have a kernel each: too few tiles for all multiprocessors, and its turns of one tile.

    A turn takes what one multiprocessor takes for one tile of rows and as many outputs.
    """
    target, tile = topology.device.target, TILE["cuda"]
    tiles = -(-p["rows"] / p["groups"] // tile) * -(-p["outputs"] // tile)
    turn = 2 * tile * tile * p["inputs"] / (target.flops_per_s("bf16") / target.cores * EFFICIENCY)
    product = -(-tiles // target.cores) * turn
    scaled = 2 * 2 * p["rows"] * p["outputs"] / target.memory_bandwidth  # read and written once more
    return p["groups"] * (2 * topology.device.launch_s + product) + scaled


def messages(table: Any, own: bool = False) -> list[Flow]:
    """An all-to-all of float[N, N] bytes; with ``own`` rows that stay on their rank move as others do."""
    found = all_to_all(range(len(table)), table.tolist())
    return found + [Flow(r, r, float(table[r, r])) for r in range(len(table)) if own and table[r, r]]


def met(chosen: Any, ranks: int) -> Any:
    """bool[T, N]: whether a token has a choice on a rank."""
    on = np.zeros((len(chosen), ranks), dtype=bool)
    on[np.arange(len(chosen))[:, None], chosen] = True
    return on


def routed(p: dict[str, Any]) -> list[Any]:
    """The rank of every choice of every rank's tokens, uniformly drawn, of ``top_groups`` of ``groups``, one a node."""
    count, top_groups = p.get("groups", p["ranks"] // 8), p.get("top_groups", 0)
    sizes = chunk_sizes(p["experts"], p["ranks"])
    groups = {"groups": count, "top_groups": top_groups} if top_groups and top_groups < count else {}
    routing = Routing("drawn")
    ids = [routing.ids(r, p["tokens"], p["top_k"], p["experts"], **groups) for r in range(p["ranks"])]
    return [owners(chosen, sizes).numpy() for chosen in ids]


def rows(topology: Topology, p: dict[str, Any]) -> tuple[float, float]:
    """Token rows to their experts: seconds, and the bytes that are counted for a bandwidth.

    ``send`` is ``slots`` (a row a choice), ``ranks`` (a row for every rank that a token has choices on) or ``nodes``
    (a row to every node, whose ranks hand it on: both at once, in small pieces). With ``own`` the kernel moves rows
    that stay on their rank as it moves the others.
    """
    ranks, row = p["ranks"], p["row"]
    home = routed(p)
    if p["send"] != "nodes":
        table = np.zeros((ranks, ranks))
        for r, chosen in enumerate(home):
            rows_to = (
                np.bincount(chosen.ravel(), minlength=ranks) if p["send"] == "slots" else met(chosen, ranks).sum(0)
            )
            table[r] = rows_to * row
        return alone(topology, ranks, messages(table, bool(p.get("own")))), float(table.sum(1).max())
    each, nodes = topology.per_node, ranks // topology.per_node
    between: dict[tuple[int, int], float] = {}
    inside: dict[tuple[int, int], float] = {}
    counted = 0.0
    for r, chosen in enumerate(home):
        by_node = met(chosen, ranks).reshape(-1, nodes, each)
        copies = by_node.any(2).sum(0) * float(row)
        counted = max(counted, float(copies.sum()))
        for node in range(nodes):
            relay = node * each + r % each
            if relay != r:
                between[r, relay] = float(copies[node])
            for place, size in enumerate((by_node[:, node].sum(0) * float(row)).tolist()):
                to = node * each + place
                if to != relay or p.get("own"):
                    inside[relay, to] = inside.get((relay, to), 0.0) + size
    flows = [Flow(s, d, b) for pairs in (between, inside) for (s, d), b in pairs.items()]
    return alone(topology, ranks, flows), counted


def in_chunks(topology: Topology, p: dict[str, Any], first: str) -> float:
    """A product whose rows come by an all-gather (``first``), or go by a reduce-scatter, in equal chunks."""
    ranks, chunks = p["ranks"], p["chunks"]
    make = all_gather if first == "comm" else reduce_scatter
    flows = tuple(make(range(ranks), [p["bytes"] / chunks] * ranks, topology))
    collectives = [Collective(first, "tp", tuple(range(ranks)), flows)] * chunks
    moved = (p.get("scatter", 0) + p.get("reduce", 0)) / topology.device.target.memory_bandwidth

    def part(target: Target | None = None) -> float:
        if p.get("looped"):
            return looped_product_seconds(topology, p) + moved
        return (product_seconds(topology, p, p["rows"], target) + moved) / chunks

    op = Compute("product", part(), part(topology.device.beside_collective))
    if first == "comm":
        steps: list[Step] = [Start(i) for i in range(chunks)]
        for i in range(chunks):
            steps += [Wait(i), op]
    else:
        steps = [s for i in range(chunks) for s in (op, Start(i))]
        steps += [Wait(i) for i in range(chunks)]
    if chunks == 1:
        return simulate([steps] * ranks, collectives, topology).seconds
    return topology.device.start_s + simulate([steps] * ranks, collectives, one_start(topology)).seconds


def even(topology: Topology, p: dict[str, Any]) -> float:
    """An all-to-all in which every rank sends ``bytes`` to the others together."""
    n = p["ranks"]
    return alone(topology, n, all_to_all(range(n), [[p["bytes"] / (n - 1)] * n] * n))


def gathered(topology: Topology, p: dict[str, Any]) -> float:
    """An all-gather of ``bytes`` of every rank."""
    return alone(topology, p["ranks"], all_gather(range(p["ranks"]), [p["bytes"]] * p["ranks"], topology))


def scattered(topology: Topology, p: dict[str, Any]) -> float:
    """A reduce-scatter that leaves every rank ``bytes``."""
    return alone(topology, p["ranks"], reduce_scatter(range(p["ranks"]), [p["bytes"]] * p["ranks"], topology))
