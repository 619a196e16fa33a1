"""Timelines as a picture: of some ranks, ops above and communication below; several schedules one under another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moec.calibration.picture import PictureError, require_matplotlib
from moec.simulate.steps import Span, Timeline

COLOURS = {"compute": "#4878a8", "experts": "#1f4e79", "wait": "#d9d9d9", "comm": "#e08b3e"}
_MOST_RANKS = 8


def draw_timelines(timelines: Mapping[str, Timeline], path: Path, ranks: Sequence[int] | None = None) -> None:
    """Draw one panel for each timeline, all on the same scale.

    Args:
        timelines: By title.
        path: A PNG file.
        ranks: Which ranks; by default the first eight.

    Raises:
        PictureError: matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + sum(0.5 + 0.42 * len(_shown(t, ranks)) for t in timelines.values())), dpi=120)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, timeline) in zip(panels, timelines.items(), strict=True):
        _panel(axes, title, timeline, _shown(timeline, ranks))
    panels[-1].set_xlabel("ms")
    _legend(panels[0])
    figure.set_layout_engine("constrained")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as e:
        raise PictureError(f"the picture cannot be written to {path}: {e}", hint="give a .png file") from e


def _shown(timeline: Timeline, ranks: Sequence[int] | None) -> list[int]:
    return [r for r in (range(_MOST_RANKS) if ranks is None else ranks) if r < len(timeline.ends)]


def _panel(axes: Any, title: str, timeline: Timeline, ranks: Sequence[int]) -> None:
    for row, rank in enumerate(ranks):
        for span in timeline.spans:
            if span.rank != rank:
                continue
            low = row + (0.48 if span.kind == "comm" else 0.06)
            left, width = span.begin * 1e3, (span.end - span.begin) * 1e3
            axes.broken_barh([(left, width)], (low, 0.38), facecolors=COLOURS[_kind(span)], edgecolors="white", lw=0.4)
    axes.set_yticks([row + 0.45 for row in range(len(ranks))], [f"rank {r}" for r in ranks])
    axes.set_ylim(len(ranks), 0)
    longest = max((timeline.total(rank, "compute") for rank in range(len(timeline.ends))), default=0.0)
    exposed = timeline.seconds - longest
    axes.set_title(f"{title}: {timeline.seconds * 1e3:#.3g} ms, {exposed * 1e3:#.3g} exposed", loc="left", fontsize=10)
    axes.axvline(timeline.seconds * 1e3, color="black", lw=0.8, ls=":")
    axes.spines[["top", "right"]].set_visible(False)


def _kind(span: Span) -> str:
    return "experts" if span.kind == "compute" and span.label.startswith("moe.experts") else span.kind


def _legend(axes: Any) -> None:
    from matplotlib.patches import Patch

    names = {"experts": "experts", "compute": "other ops", "wait": "waiting", "comm": "communication"}
    handles = [Patch(color=COLOURS[k], label=name) for k, name in names.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=8)
