"""Published measurements against what the simulator says of them, misses included.

``python benchmarks/published.py`` prints the table; ``--write`` puts it into docs/simulator.md. The measurements, their
conditions and sources are in published.json. Machines are the presets of moec.simulate: no number is fitted to a row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.cost.curve import EFFICIENCY, TILE
from moec.ir.parallel_semantics import chunk_sizes, owners
from moec.simulate import Routing, Topology, load_topology, simulate
from moec.simulate.collectives import all_gather, all_to_all, reduce_scatter
from moec.simulate.steps import Collective, Compute, Flow, Start, Step, Wait

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "simulator.md"
BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"
SCALE = {"us": 1e6, "ms": 1e3}


def alone(topology: Topology, ranks: int, flows: Sequence[Flow]) -> float:
    """Seconds of one collective."""
    collective = Collective("one", "ep", tuple(range(ranks)), tuple(flows))
    return simulate([[Start(0), Wait(0)]] * ranks, [collective], topology).seconds


def product_seconds(topology: Topology, p: dict[str, Any], rows: float) -> float:
    """Of one GEMM of ``rows`` rows dealt out to ``groups`` experts: whole tiles of rows, or the weights' bytes."""
    target = topology.device.target
    tile = TILE[target.kind]
    each = -(-rows / p["groups"] // tile) * tile
    compute = 2 * each * p["groups"] * p["outputs"] * p["inputs"] / (target.flops_per_s("bf16") * EFFICIENCY)
    bytes = 2 * (rows * (p["inputs"] + p["outputs"]) + p["groups"] * p["inputs"] * p["outputs"])
    return topology.device.launch_s + max(compute, bytes / target.memory_bandwidth)


def met(chosen: Any, ranks: int) -> Any:
    """bool[T, N]: whether a token has a choice on a rank."""
    on = np.zeros((len(chosen), ranks), dtype=bool)
    on[np.arange(len(chosen))[:, None], chosen] = True
    return on


def routed(p: dict[str, Any]) -> list[Any]:
    """The rank of every choice of every rank's tokens, uniformly drawn."""
    nodes, top_groups = p["ranks"] // 8, p.get("top_groups", 0)
    sizes = chunk_sizes(p["experts"], p["ranks"])
    groups = {"groups": nodes, "top_groups": top_groups} if top_groups and top_groups < nodes else {}
    routing = Routing("drawn")
    ids = [routing.ids(r, p["tokens"], p["top_k"], p["experts"], **groups) for r in range(p["ranks"])]
    return [owners(chosen, sizes).numpy() for chosen in ids]


def rows(topology: Topology, p: dict[str, Any]) -> tuple[float, float]:
    """Token rows to their experts: seconds, and the bytes that are counted for a bandwidth.

    ``send`` is ``slots`` (a row a choice), ``ranks`` (a row for every rank that a token has choices on) or ``nodes``
    (a row to every node, whose ranks hand it on: both at once, in small pieces).
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
        return alone(topology, ranks, all_to_all(range(ranks), table.tolist())), float(table.sum(1).max())
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
                if to != relay:
                    inside[relay, to] = inside.get((relay, to), 0.0) + size
    flows = [Flow(s, d, b) for pairs in (between, inside) for (s, d), b in pairs.items()]
    return alone(topology, ranks, flows), counted


def in_chunks(topology: Topology, p: dict[str, Any], first: str) -> float:
    """A product whose rows come by an all-gather (``first``), or go by a reduce-scatter, in equal chunks."""
    ranks, chunks = p["ranks"], p["chunks"]
    make = all_gather if first == "comm" else reduce_scatter
    flows = tuple(make(range(ranks), [p["bytes"] / chunks] * ranks, topology))
    collectives = [Collective(first, "tp", tuple(range(ranks)), flows)] * chunks
    moved = p.get("scatter", 0) + p.get("reduce", 0)
    whole = product_seconds(topology, p, p["rows"]) + moved / topology.device.target.memory_bandwidth
    seconds = whole / chunks  # of one kernel, whose tiles start as their rows are there
    if first == "comm":
        steps: list[Step] = [Start(i) for i in range(chunks)]
        for i in range(chunks):
            steps += [Wait(i), Compute("product", seconds)]
    else:
        steps = [s for i in range(chunks) for s in (Compute("product", seconds), Start(i))]
        steps += [Wait(i) for i in range(chunks)]
    return simulate([steps] * ranks, collectives, topology).seconds


def predict(row: dict[str, Any]) -> float:
    """The row's number, in its unit."""
    p, unit = row["predict"], row["unit"]
    topology = load_topology(p["topology"]).first(p.get("ranks", 1))
    counted = 0.0
    kind = p["kind"]
    if kind == "rows":
        seconds, counted = rows(topology, p)
    elif kind == "repeated_rows":
        seconds = p["times"] * rows(topology, p)[0]
    elif kind == "even":
        n = p["ranks"]
        seconds = alone(topology, n, all_to_all(range(n), [[p["bytes"] / (n - 1)] * n] * n))
    elif kind in ("all_gather", "reduce_scatter"):
        make: Callable[..., list[Flow]] = all_gather if kind == "all_gather" else reduce_scatter
        seconds = alone(topology, p["ranks"], make(range(p["ranks"]), [p["bytes"]] * p["ranks"], topology))
    elif kind == "product":
        seconds = p.get("times", 1) * product_seconds(topology, p, p["rows"])
    elif kind == "product_ratio":
        return 2 * product_seconds(topology, p, p["rows"] / 2) / product_seconds(topology, p, p["rows"])
    else:
        seconds = in_chunks(topology, p, "comm" if kind == "gathered_product" else "product")
    return counted / seconds / 1e9 if unit == "GB/s" else seconds * SCALE[unit]


def table(found: Sequence[tuple[dict[str, Any], float]]) -> str:
    """Markdown, with the mean and the median of the errors below."""
    lines = ["| measured | published | here | error | source |", "|---|---|---|---|---|"]
    errors = []
    for row, value in found:
        error = value / row["measured"] - 1
        errors.append(abs(error))
        unit = "x" if row["unit"] == "ratio" else row["unit"]
        lines.append(
            f"| {row['what']} | {row['measured']:.4g} {unit} | {value:.4g} {unit} | {error:+.0%} | {row['source']} |"
        )
    errors.sort()
    count, within = len(errors), sum(e <= 0.2 for e in errors)
    middle, mean, worst = errors[count // 2], sum(errors) / count, errors[-1]
    lines += [
        "",
        f"{count} measurements, {within} within 20 %; median error {middle:.0%}, mean {mean:.0%}, worst {worst:.0%}.",
        "",
        "Conditions:",
        "",
    ]
    seen: dict[tuple[str, str], None] = {}
    for row, _ in found:
        seen[row["source"], row["conditions"]] = None
    return "\n".join([*lines, *(f"- {source}: {conditions}." for source, conditions in seen)]) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/simulator.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page's table is another")
    parser.add_argument("--only", default="", help="rows whose id begins so")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data = json.loads((HERE / "published.json").read_text(encoding="utf-8"))["rows"]
    found = [(row, predict(row)) for row in data if row["id"].startswith(args.only)]
    text = table(found)
    if not (args.write or args.check):
        sys.stdout.write(text)
        return 0
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    made = f"{before}{BEGIN}\n{text}{END}{after}"
    if args.check:
        return int(made != page)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
