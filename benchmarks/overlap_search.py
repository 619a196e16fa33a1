"""The pass overlap's choice of chunks against all that there are, and against other systems' rules.

    python benchmarks/overlap_search.py --cases 10000 --jobs 2

For layers drawn at random, the predicted step of the chosen schedule over that of the best: of all ways to cut experts
or tokens (whole sixteenths) into up to eight chunks, experts with and without a chunk of the rank's own rows first.
Every rank's own time counts, and in half of the layers what a chunk costs beside its rows. The rules of torchtitan,
Tutel and FSMoE are judged by the same times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.passes.overlap.cuts import ByExperts, Cut, Layer
from moec.passes.overlap.policies import CUTS, EVERYTHING, POLICIES, choose, equal, own_rows
from moec.passes.overlap.search import MOST
from moec.passes.overlap.timeline import Chunk
from overlap_cases import draw_layer

Array = NDArray[Any]
BATCH = 50
"""Cases that a process takes at a time."""


def compositions(units: int, most: int) -> Array:
    """Edges of all ways to cut ``units`` into up to ``most`` chunks; [ways, most + 1], the last edge repeated."""
    found = [
        (0, *inner, *(units,) * (most - len(inner)))
        for count in range(min(most, units))
        for inner in itertools.combinations(range(1, units), count)
    ]
    return np.array(found)


def best_of_all(cut: Cut, first: Chunk | None, edges: Array, cut_s: float, counting: float) -> float:
    """Seconds of the best way: every way's timeline at once.

    Ways of several chunks take ``cut_s`` more, and their first experts wait until all rows were told to leave, which
    begins when they were counted, after ``counting``.
    """
    units = cut.units
    ranks = len(cut.layer.sizes)
    there, back = np.zeros((units + 1, units + 1)), np.zeros((units + 1, units + 1))
    compute = np.zeros((units + 1, units + 1, ranks))
    for a, b in itertools.combinations(range(units + 1), 2):
        chunk = cut.chunk(a, b)
        there[a, b], back[a, b], compute[a, b] = chunk.there, chunk.back, chunk.compute
    a, b = edges[:, :-1], edges[:, 1:]
    before = first.there if first else 0.0
    arrived = before + np.cumsum(there[a, b], axis=1)
    several = np.full(len(edges), first is not None) | (edges[:, 1] < units)
    calls = several * (counting + (a < b).sum(axis=1) * cut.layer.front_s.get(cut.along, 0.0))
    busy = np.zeros((len(edges), ranks)) + np.maximum(before, calls)[:, None] + (first.compute if first else 0.0)
    done = np.zeros(a.shape)
    for i in range(a.shape[1]):
        busy = np.maximum(busy, arrived[:, i, None]) + compute[a[:, i], b[:, i]]
        done[:, i] = busy.max(axis=1)
    links = arrived[:, -1]
    for i in range(a.shape[1]):
        links = np.maximum(links, done[:, i]) + back[a[:, i], b[:, i]]
    return float((links + several * cut_s).min())


def exhaustive(layer: Layer, allowed: Sequence[str] = EVERYTHING, most: int = MOST) -> float:
    """Seconds of the best schedule that there is; equal parts of tokens need not be whole sixteenths."""
    own, rest = own_rows(layer)
    counting = layer.links.seconds(0.0, layer.count_messages)
    best = [s.seconds for s in equal(layer, range(1, most + 1))] if "tokens" in allowed else []
    for along in (a for a in CUTS if a in allowed):
        whole = CUTS[along](layer)
        best.append(best_of_all(whole, None, _edges(whole.units, most), layer.joining.get(along, 0.0), counting))
    if "own" in allowed:
        cut = ByExperts(rest)
        best.append(best_of_all(cut, own, _edges(cut.units, most - 1), layer.joining.get("experts", 0.0), counting))
    return min(best)


_EDGES: dict[tuple[int, int], Array] = {}


def _edges(units: int, most: int) -> Array:
    if (units, most) not in _EDGES:
        _EDGES[units, most] = compositions(units, most)
    return _EDGES[units, most]


@dataclass
class Found:
    """Seconds of every policy and of the best, one number a case; and seconds that planning took."""

    best: list[float] = field(default_factory=list)
    by: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in POLICIES})
    planning: list[float] = field(default_factory=list)


def compare(cases: Iterable[int]) -> Found:
    """Draw layers, each by its number, and plan them."""
    found = Found()
    for case in cases:
        layer = draw_layer(random.Random(case))
        for policy in POLICIES:
            before = time.perf_counter()
            found.by[policy].append(choose(policy, layer, EVERYTHING).seconds)
            if policy == "auto":
                found.planning.append(time.perf_counter() - before)
        found.best.append(exhaustive(layer))
    return found


def share_out(cases: range, jobs: int) -> Found:
    """The same by several processes."""
    if jobs < 2:
        return compare(cases)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return join(pool.map(compare, (cases[i : i + BATCH] for i in range(0, len(cases), BATCH)), chunksize=1))


def read(file: Path) -> Found:
    """What a run wrote."""
    return Found(**json.loads(file.read_text(encoding="utf-8")))


def join(parts: Iterable[Found]) -> Found:
    """All cases of several runs."""
    whole = Found()
    for part in parts:
        whole.best += part.best
        whole.planning += part.planning
        for policy, times in part.by.items():
            whole.by[policy] += times
    return whole


def summary(found: Found) -> dict[str, Any]:
    """What the page shows."""
    best = np.array(found.best)
    over = {p: np.array(times) / best - 1 for p, times in found.by.items()}
    others = np.min([found.by[p] for p in POLICIES if p != "auto"], axis=0)
    return {
        "cases": len(best),
        "policies": {
            p: {"mean": float(o.mean()), "p99": float(np.quantile(o, 0.99)), "worst": float(o.max())}
            for p, o in over.items()
        },
        "auto_over_best_other": float((np.array(found.by["auto"]) / others).max()),
        "speedup_over_none": float(np.mean(np.array(found.by["none"]) / np.array(found.by["auto"]))),
        "planning_ms": {"median": 1e3 * float(np.median(found.planning)), "worst": 1e3 * max(found.planning)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="show what earlier runs wrote instead")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cases")
    parser.add_argument("--json", type=Path, help="write every case's numbers")
    args = parser.parse_args()
    cases = range(args.first, args.first + args.cases)
    found = join(map(read, args.files)) if args.files else share_out(cases, args.jobs)
    if args.json:
        args.json.write_text(json.dumps(asdict(found)), encoding="utf-8")
    numbers = summary(found)
    print("| policy | over the best, mean | 99 of 100 cases | worst |\n|---|---|---|---|")
    for policy, o in numbers["policies"].items():
        print(f"| {policy} | {o['mean']:.2%} | {o['p99']:.2%} | {o['worst']:.2%} |")
    print(f"\ncases: {numbers['cases']}")
    print(f"auto over the best of the other policies, worst: {numbers['auto_over_best_other']:.4f}")
    print(f"none over auto, mean: {numbers['speedup_over_none']:.3f}")
    print(f"planning: {numbers['planning_ms']['median']:.0f} ms, worst {numbers['planning_ms']['worst']:.0f} ms")


if __name__ == "__main__":
    main()
