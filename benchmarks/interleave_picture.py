"""Draws when links and a rank work on two micro-batches: in turn, and interleaved.

    python benchmarks/interleave_picture.py docs/interleave.png

Forward of two layers of Qwen3-30B-A3B's sizes on eight H100 as the cost model sees them, 4096 tokens of a rank in each
micro-batch, links of 450 GB/s and 10 µs. Attention is its four projections, at the efficiency of the experts' GEMMs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from moec.cost import LayerShape
from moec.cost.curve import assumed_curve
from moec.cost.links import Link
from moec.passes.interleave_layers.order import Task
from moec.passes.interleave_layers.pieces import Pieces, Step
from moec.passes.interleave_layers.worth import Span, in_turn, interleaved, timeline
from moec.targets import parse_target

SHAPE = LayerShape(hidden=2048, inner=768, width=2048, experts=128, top_k=8)
RANKS, TOKENS, LAYERS, HEADS, KV = 8, 4096, 2, 32 * 128, 4 * 128
LINK = Link(10e-6, 450e9)
PIECE_S = 20e-6
"""Of an op of a layer in pieces: a start of a kernel, twice."""
COLOURS = (("#4c78a8", "#9ecae9"), ("#f58518", "#ffbf79"))
"""Of a micro-batch: experts, attention."""


def work() -> tuple[list[Task], dict[int, Pieces], dict[int, float]]:
    """Tasks, layers and seconds of attention: all of the first micro-batch, then all of the second."""
    curve = assumed_curve(SHAPE, parse_target("cuda:sm90"))
    own = SHAPE.experts // RANKS
    experts = curve.seconds([TOKENS * SHAPE.top_k / own] * own)
    flops = 3 * SHAPE.top_k * SHAPE.hidden * SHAPE.inner
    attention = experts * 2 * SHAPE.hidden * (HEADS + KV) / flops
    rows = TOKENS * SHAPE.top_k * (RANKS - 1) / RANKS
    travel = Step("start", LINK.seconds(rows * SHAPE.hidden * SHAPE.item))
    layer: Pieces = ((travel,), (Step("wait", of=0), Step("compute", experts), travel), (Step("wait", of=1),))
    tasks = [Task((i - 1,) if i % (2 * LAYERS) else ()) for i in range(4 * LAYERS)]
    layers = {i: layer for i in range(len(tasks)) if i % 2}
    return tasks, layers, {i: attention for i in range(len(tasks)) if not i % 2}


def draw(lines: dict[str, list[Span]], path: Path) -> None:
    """One line of the rank and one of its links for each order, over one axis of time."""
    figure, axes = plt.subplots(len(lines), sharex=True, figsize=(8, 1.3 * len(lines) + 0.8))
    for ax, (name, spans) in zip(axes, lines.items(), strict=True):
        for span in spans:
            batch, part = divmod(span.task, 2 * LAYERS)
            if span.task < 0 or span.end - span.start <= PIECE_S:
                continue
            colour = COLOURS[batch][span.what == "compute" and not part % 2]
            y, width = int(span.what == "travel"), (span.end - span.start) * 1e3
            ax.barh(y, width, left=span.start * 1e3, height=0.7, color=colour, edgecolor="white")
            if width > 0.05:
                ax.text(
                    span.start * 1e3 + width / 2, y, f"{'ab'[batch]}{part // 2 + 1}", ha="center", va="center", size=7
                )
        ax.set_yticks([0, 1], ["rank", "links"])
        ax.set_title(f"{name}: {spans[-1].end * 1e3:.1f} ms", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("ms; micro-batches a and b, layers 1 and 2; dark: experts and rows, light: attention")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    tasks, layers, computing = work()
    dual = interleaved(tasks, layers, computing, layers, PIECE_S)
    draw({"in turn": timeline(in_turn(tasks, layers, computing)), "interleaved": timeline(dual)}, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
