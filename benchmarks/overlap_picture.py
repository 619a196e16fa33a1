"""Draws when links and experts work: a layer whole, in two equal chunks of tokens, and as the pass overlap cuts it.

    python benchmarks/overlap_picture.py docs/overlap.png

The layer: Qwen3-30B-A3B's experts on eight H100, 4096 tokens a rank, links of 450 GB/s and 10 µs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from moec.cost import LayerShape
from moec.cost.curve import assumed_curve
from moec.cost.links import Link
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.policies import Schedule, auto, two, uncut
from moec.passes.overlap.timeline import timeline
from moec.targets import parse_target

SHAPE = LayerShape(hidden=2048, inner=768, width=2048, experts=128, top_k=8)
RANKS, TOKENS = 8, 4096
COLOURS = {"there": "#4c78a8", "compute": "#f58518", "back": "#54a24b"}
NAMES = {"there": "rows to experts", "compute": "experts", "back": "rows home"}


def layer() -> Layer:
    """The layer, forwards, with tokens spread evenly."""
    rows = [[TOKENS * SHAPE.top_k / SHAPE.experts] * SHAPE.experts] * RANKS
    curve = assumed_curve(SHAPE, parse_target("cuda:sm90"))
    width = SHAPE.hidden * SHAPE.item
    return Layer(rows, (SHAPE.experts // RANKS,) * RANKS, curve, Link(10e-6, 450e9), width, width)


def draw(schedules: dict[str, Schedule], path: Path) -> None:
    """One line of links and one of experts for each schedule, over one axis of time."""
    figure, axes = plt.subplots(len(schedules), sharex=True, figsize=(8, 1.25 * len(schedules) + 0.8))
    for ax, (name, schedule) in zip(axes, schedules.items(), strict=True):
        for span in timeline(schedule.chunks):
            if span.what == "compute" and span.rank:
                continue
            y, width = (0 if span.what == "compute" else 1), (span.end - span.start) * 1e3
            ax.barh(y, width, left=span.start * 1e3, height=0.7, color=COLOURS[span.what], edgecolor="white")
            if width > 0.02 * schedule.seconds * 1e3:
                ax.text(span.start * 1e3 + width / 2, y, str(span.chunk), ha="center", va="center", color="white")
        ax.set_yticks([0, 1], ["experts", "links"])
        ax.set_title(f"{name}: {schedule.seconds * 1e3:.2f} ms", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("ms; numbers are chunks")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[what]) for what in COLOURS]
    figure.legend(handles, NAMES.values(), loc="upper right", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    here = layer()
    best = auto(here, ("experts", "tokens"))
    sizes = ", ".join(map(str, best.sizes))
    draw(
        {
            "no overlap": uncut(here),
            "two equal chunks of tokens": two(here),
            f"overlap, chunks of {sizes} {best.along}": best,
        },
        Path(sys.argv[1]),
    )


if __name__ == "__main__":
    main()
