"""Layers drawn at random for the search of schedules: latency, bandwidth, GEMM curves and histograms."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.tiers import Carried, TieredLayer

FREE = 0.5
"""Part of the layers whose chunks cost nothing beside their rows."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024)


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    """A number between the two, as likely to be in one decade as in another."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def draw_curve(rng: random.Random) -> LayerCurve:
    """Reading weights, then multiply-adds by whole tiles; how far the two overlap differs."""
    reading, row = log_uniform(rng, 1e-6, 1e-4), log_uniform(rng, 1e-8, 1e-5)
    tile, power = rng.choice((1, 6, 16, 64, 128)), rng.choice((1.0, 1.5, 4.0))
    points: list[tuple[float, float]] = []
    for rows in sorted({*ROWS, *(n * tile + more for n in range(1, 9) for more in (0, 1))}):
        compute = -(-rows // tile) * tile * row
        points.append((float(rows), (reading**power + compute**power) ** (1 / power)))
    return LayerCurve(log_uniform(rng, 1e-6, 1e-4), tuple(points))


def draw_rows(rng: random.Random, ranks: int, experts: int, tokens: int, top_k: int) -> list[list[float]]:
    """Rows from every rank for every expert: Zipf's popularity, and ranks whose tokens differ."""
    skew, differ = rng.choice((0.0, rng.uniform(0, 1.2))), rng.choice((0.0, rng.uniform(0, 1)))
    popular = [(place + 1) ** -skew for place in range(experts)]
    rng.shuffle(popular)
    rows = []
    for _ in range(ranks):
        mine = [p * math.exp(differ * rng.gauss(0, 1)) for p in popular]
        rows.append([tokens * top_k * p / sum(mine) for p in mine])
    return rows


def draw_layer(rng: random.Random) -> Layer:
    """One layer whose experts take 0.25 to 4 times as long as its links do, both as one piece."""
    ranks, own = rng.choice((2, 2, 4, 8)), rng.choice((1, 2, 3, 4, 8, 16, 32))
    sizes = (own,) * ranks
    if own > 1 and rng.random() < 0.2:
        sizes = (*sizes[:-1], own - 1)
    tokens, top_k = round(log_uniform(rng, 16, 8192)), rng.choice((1, 2, 4, 8))
    rows, curve = draw_rows(rng, ranks, sum(sizes), tokens, top_k), draw_curve(rng)
    edges = [sum(sizes[:r]) for r in range(ranks + 1)]
    loads = [[sum(row[e] for row in rows) for e in range(edges[r], edges[r + 1])] for r in range(ranks)]
    compute = max(map(curve.seconds, loads))
    sent = [sum(row) - sum(row[edges[r] : edges[r + 1]]) for r, row in enumerate(rows)]
    came = [sum(loads[r]) - sum(rows[r][edges[r] : edges[r + 1]]) for r in range(ranks)]
    wire = compute / log_uniform(rng, 0.25, 4) / 2
    latency = wire * log_uniform(rng, 1e-4, 0.5)
    back = rng.choice((1.0, 1.0, 2.0))  # rows may go out in half of the bytes that they come home in
    link = Link(latency, max(*sent, *came) * (1 + back) / 2 / (wire - latency))
    messages = rng.choice(((1, 1), (1, 1), (3, 2)))  # a forward, or a backward
    layer = Layer(rows, sizes, curve, link, 1.0, back, *messages)
    return layer if rng.random() < FREE else beside(rng, layer, compute + 2 * wire)


def beside(rng: random.Random, layer: Layer, whole: float) -> Layer:
    """The layer with chunks that cost something beside their rows, by the seconds of the whole layer."""
    calls = whole * log_uniform(rng, 1e-3, 0.1)
    per_byte = rng.uniform(0, 0.5) / layer.links.bytes_per_s  # threads that send work for a part of the time
    burden = None
    if rng.random() < 0.5:
        burden = Link(layer.links.alpha_s * rng.uniform(0, 0.5), 1 / max(per_byte, 1e-30))
    joining = {"experts": whole * log_uniform(rng, 1e-4, 0.05), "tokens": whole * log_uniform(rng, 1e-4, 0.05)}
    chunk_s = {"experts": calls, "tokens": calls * rng.uniform(1, 3)}
    share = rng.choice((0.0, rng.uniform(0, 1)))  # of the calls, before the first experts
    front_s = {along: seconds * share for along, seconds in chunk_s.items()}
    return replace(layer, chunk_s=chunk_s, front_s=front_s, burden=burden, joining=joining)


def draw_tiers(rng: random.Random) -> TieredLayer:
    """A layer over two tiers: compute over communication from a quarter to four, tiers that are alike or far apart."""
    ranks, slow = rng.choice((1, 2, 4)), rng.choice((1.0, 2.0, 8.0))
    loads = tuple(tuple(rng.uniform(10, 400) for _ in range(4)) for _ in range(ranks))
    base = rng.choice((1e-4, 4e-4))
    curve = LayerCurve(1e-5, tuple((float(n), base + n * 2e-6) for n in (1, 64, 512)))
    total = max(curve.seconds(load) for load in loads) / rng.choice((0.25, 1.0, 4.0))
    alpha = total * rng.choice((0.0, 0.01, 0.05))
    links = Link(alpha, slow), Link(alpha / 3, rng.choice((1.0, 4.0)))
    there, inside, back = total * slow / 4, total / 4, total * slow / 2
    burdens = (Link(alpha, slow * 10), None) if rng.random() < 0.5 else (None, None)
    layer = TieredLayer(
        loads, curve, links,
        (Carried(0, 1, 0.0), Carried(0, 2, there), Carried(1, 1, 0.0), Carried(1, 1, inside)),
        (Carried(1, 1, inside), Carried(0, 1, back)), burdens=burdens,
    )  # fmt: skip
    return replace(layer, joining=total * rng.choice((0.0, 0.01)), chunk_s=total * rng.choice((0.0, 0.02)))
