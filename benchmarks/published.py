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

import torch

from moec.simulate import Topology, load_topology
from published_fsmoe import gain as fsmoe_gain
from published_layers import hidden, layer, pipelining_gain, slower_in_chunks, training_step
from published_overlap import pair, throughput, trained_gain, trained_seconds, two_batch_gain
from published_parts import even, gathered, in_chunks, product_seconds, rows, scattered

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "simulator.md"
BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"


SCALE = {"us": 1e6, "ms": 1e3, "s": 1.0}
RATIOS: dict[str, Callable[[Topology, dict[str, Any]], float]] = {
    "hidden": hidden,
    "pipelining_gain": pipelining_gain,
    "slower_in_chunks": slower_in_chunks,
    "two_batch_gain": two_batch_gain,
    "throughput": throughput,
    "trained_gain": trained_gain,
}
SECONDS: dict[str, Callable[[Topology, dict[str, Any]], float]] = {
    "even": even,
    "all_gather": gathered,
    "reduce_scatter": scattered,
    "gathered_product": lambda t, p: in_chunks(t, p, "comm"),
    "scattered_product": lambda t, p: in_chunks(t, p, "product"),
    "layer": layer,
    "training_step": training_step,
    "trained": lambda t, p: trained_seconds(t, p, bool(p.get("overlapped"))),
    "pair": pair,
}
"""Kinds of rows, and who predicts them."""


def predict(row: dict[str, Any]) -> float:
    """The row's number, in its unit."""
    p, unit = row["predict"], row["unit"]
    if p["kind"] == "fsmoe":
        return fsmoe_gain(p["schedule"], p["every"])
    topology = load_topology(p["topology"]).first(p.get("ranks", 1))
    if p["kind"] in RATIOS:
        return RATIOS[p["kind"]](topology, p)
    counted = 0.0
    if p["kind"] == "rows":
        seconds, counted = rows(topology, p)
        seconds *= p.get("times", 1)
    elif p["kind"] == "product":
        target = topology.device.beside_collective if p.get("beside") else None
        seconds = p.get("times", 1) * product_seconds(topology, p, p["rows"], target)
        counted = 2 * p["rows"] * p["outputs"] * p["inputs"] / 1e3
    else:
        seconds = SECONDS[p["kind"]](topology, p)
    return counted / seconds / 1e9 if unit in ("GB/s", "TFLOPS") else seconds * SCALE[unit]


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
