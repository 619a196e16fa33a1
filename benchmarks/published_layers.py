"""What the simulator says of expert-parallel layers: rows there, the experts' products, rows back.

A layer runs whole; in chunks of kernels and collectives of their own; or in one kernel whose tiles start as their rows
come, which is a pipeline of equal parts with one start.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from moec.simulate import Timeline, Topology, simulate
from moec.simulate.collectives import all_to_all
from moec.simulate.planning import MachineCosts
from moec.simulate.steps import Collective, Compute, Start, Step, Wait
from moec.targets import Target
from published_parts import alone, messages, met, one_start, product_seconds, routed

IN_ONE_KERNEL = 8
"""Parts in which one kernel takes its rows. More change little: their first and last are what is exposed."""


def experts_seconds(topology: Topology, p: dict[str, Any], rows: float, target: Target | None = None) -> float:
    """Of a rank's experts: both products, and the activation's bytes where it is a kernel of its own."""
    groups, parts = max(1, round(p["experts"] / p["ranks"])), p.get("parts", 2)
    up = {**p, "groups": groups, "inputs": p["hidden"], "outputs": parts * p["inner"]}
    down = {**p, "groups": groups, "inputs": p["inner"], "outputs": p["hidden"]}
    found = product_seconds(topology, up, rows, target) + product_seconds(topology, down, rows, target)
    if p.get("fused"):
        return found - 2 * topology.device.launch_s
    moved = rows * p["inner"] * (parts * max(2, p.get("item", 2)) + p.get("item", 2))
    return found + topology.device.launch_s + moved / topology.device.target.memory_bandwidth


def run_layer(topology: Topology, p: dict[str, Any], there: Any, back: Any, chunks: int) -> Timeline:
    """A layer in ``chunks`` equal chunks of every expert's rows; all rows leave before the first experts run.

    Args:
        topology: With as many ranks as the tables.
        p: Sizes, as experts_seconds takes them; ``rows`` of a rank.
        there, back: [N][N], bytes of every rank to every other.
        chunks: How many.
    """
    ranks = len(there)
    collectives = []
    for name, table in (("there", there), ("back", back)):
        flows = tuple(messages(table / chunks, bool(p.get("own"))))
        collectives += [Collective(name, "ep", tuple(range(ranks)), flows)] * chunks
    beside = topology.device.beside_collective
    if p.get("fused"):
        seconds, slower = (experts_seconds(topology, p, p["rows"], t) / chunks for t in (None, beside))
    else:
        seconds, slower = (experts_seconds(topology, p, p["rows"] / chunks, t) for t in (None, beside))
    steps: list[Step] = [Start(i) for i in range(chunks)]
    for i in range(chunks):
        steps += [Wait(i), Compute("experts", seconds, slower), Start(chunks + i)]
    steps += [Wait(chunks + i) for i in range(chunks)]
    return simulate([steps] * ranks, collectives, topology)


def sent_rows(p: dict[str, Any]) -> Any:
    """[N][N], rows of every rank to every other: one a choice, or one for every rank that a token has choices on."""
    ranks = p["ranks"]
    by_slot = p.get("send", "slots") == "slots"
    return np.array([np.bincount(c.ravel(), minlength=ranks) if by_slot else met(c, ranks).sum(0) for c in routed(p)])


def layer(topology: Topology, p: dict[str, Any]) -> float:
    """Seconds of an expert-parallel layer, forward: one after the other, or in one kernel."""
    table = sent_rows(p)
    p = {**p, "rows": p["tokens"] * p["top_k"]}
    there, back = table * p["row"], table * p["row_back"]
    return in_one_kernel(topology, p, there, back) if p.get("fused") else run_layer(topology, p, there, back, 1).seconds


def in_one_kernel(topology: Topology, p: dict[str, Any], there: Any, back: Any) -> float:
    """Seconds of a layer that is one kernel."""
    device = topology.device
    return device.launch_s + device.start_s + run_layer(one_start(topology), p, there, back, IN_ONE_KERNEL).seconds


def hidden(topology: Topology, p: dict[str, Any]) -> float:
    """Percent of a layer's communication that its experts hide in one kernel; units that it takes are exposed."""
    table = sent_rows(p)
    p = {**p, "rows": p["tokens"] * p["top_k"]}
    there, back = table * p["row"], table * p["row_back"]
    ranks = range(p["ranks"])
    comm = alone(topology, p["ranks"], all_to_all(ranks, there)) + alone(topology, p["ranks"], all_to_all(ranks, back))
    exposed = in_one_kernel(topology, p, there, back) - experts_seconds(topology, p, p["rows"])
    return 100 * (1 - exposed / comm)


def training_step(topology: Topology, p: dict[str, Any]) -> float:
    """A layer forward and backward without overlap: four all-to-alls, each product three times; its other kernels."""
    table = sent_rows(p) * p["row"]
    rows = p["tokens"] * p["top_k"]
    comm = 4 * alone(topology, p["ranks"], all_to_all(range(p["ranks"]), table))
    item, target = p["item"], topology.device.target
    copied = 3 * 2 * item * p["hidden"] * (p["tokens"] + rows)  # tokens to slots and back, and both again backwards
    return comm + 3 * experts_seconds(topology, p, rows) + copied / target.memory_bandwidth


def of_two(topology: Topology, ranks: int) -> Topology:
    """Two ranks whose links take as long as a balanced all-to-all of ``ranks`` ranks does."""
    link = MachineCosts(topology.first(ranks)).transport("ep", ranks)
    assert link is not None
    device = replace(topology.device, start_s=0.0)
    return Topology("two", "of many", device, 1, 2, link)


def pipelining_gain(topology: Topology, p: dict[str, Any]) -> float:
    """How many times as fast the best of Tutel's degrees is as one chunk, mean over layers."""
    two, ranks = of_two(topology, p["ranks"]), p["ranks"]
    gains = []
    for tokens, own, width, inner in product(p["tokens"], p["own"], p["hidden"], p["inner"]):
        shared = max(1.0, 1 / own)  # an expert of several ranks: each has all its rows, and a part of its inner width
        rows = tokens * p["top_k"] * shared
        sizes = {"experts": 2 * max(1, own), "ranks": 2, "hidden": width, "inner": inner / shared, "parts": 1}
        bytes = rows * width * 2 * (ranks - 1) / ranks
        table = np.array([[0.0, bytes], [bytes, 0.0]])
        times = [run_layer(two, {**sizes, "rows": rows}, table, table, d).seconds for d in (1, 2, 4, 8)]
        gains.append(times[0] / min(times))
    return sum(gains) / len(gains)


def slower_in_chunks(topology: Topology, p: dict[str, Any]) -> float:
    """How many times as long the experts' products take in two chunks beside communication as in one without."""
    table = sent_rows(p) * p["row"]
    p = {**p, "rows": p["tokens"] * p["top_k"]}
    spans = run_layer(topology, p, table, table, 2)
    return spans.total(0, "compute") / experts_seconds(topology, p, p["rows"])
