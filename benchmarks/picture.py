"""The roofline: what every cell reached, against what memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKERS = "osD^vP*X"


def draw(cells: Sequence[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Writes a picture of the cells: FLOP per byte of touched weights across, GFLOP/s up, both logarithmic.

    Args:
        cells: As ``report.cell_json`` makes them.
        machine: As ``report.machine_json`` makes it.
        path: Its suffix chooses the format.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--picture needs matplotlib: pip install 'moec[bench]'") from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    across = [c["flops"] / c["bytes"] for c in cells]
    left, right = min(across) / 2, max(across) * 2
    for rate, style, label in (
        (machine["flops"], "-", "best GEMM"),
        (machine["registers"], ":", "multiply-adds on registers"),
    ):
        ridge = rate / machine["bandwidth"]
        points = sorted({left, min(max(ridge, left), right), right})
        roof = [min(rate, machine["bandwidth"] * p) / 1e9 for p in points]
        axes.plot(points, roof, style, color="black", label=f"{label}, {rate / 1e9:.0f} GFLOP/s")
    axes.plot([], [], " ", label=f"slope: {machine['bandwidth'] / 1e9:.1f} GB/s")
    names = list(dict.fromkeys(n for c in cells for n in c["median"]))
    for n, name in enumerate(names):
        own = [(c["flops"] / c["bytes"], c["flops"] / c["median"][name] / 1e9) for c in cells if name in c["median"]]
        x, y = zip(*own, strict=True)
        axes.scatter(x, y, marker=MARKERS[n % len(MARKERS)], s=45 if n == 0 else 22, alpha=0.8, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of touched weights")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"One MoE layer, {machine['dtype']}, {machine['threads']} threads, {machine['processor']}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
