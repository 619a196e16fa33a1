"""A profile's GEMM curves as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from moec.cost import MachineProfile
from moec.ir.errors import MoecError


class PictureError(MoecError):
    """A picture that cannot be drawn."""

    code = "picture"


def require_matplotlib() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        PictureError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PictureError("a picture needs matplotlib", hint="pip install 'moec[bench]', or leave --picture out")


def draw(machine: MachineProfile, path: Path) -> None:
    """Time of a touched expert against its rows, beside the machine's limit; one colour a type, both axes logarithmic.

    Raises:
        PictureError: matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = {dtype: f"C{i}" for i, dtype in enumerate(dict.fromkeys(c.dtype for c in machine.curves))}
    for curve in machine.curves:
        rows = [r for r, _ in curve.points]
        colour, style = colours[curve.dtype], "-" if curve.threads == machine.cores else "--"
        label = f"{curve.dtype}, {curve.threads} thread{'s' * (curve.threads > 1)}"
        axes.loglog(rows, [ns for _, ns in curve.points], style, color=colour, marker=".", label=label)
        floor = [machine.floor(curve.dtype, curve.isa, curve.threads, r) * 1e9 for r in rows]
        axes.loglog(rows, floor, ":", color=colour, linewidth=1)
    axes.set_xlabel("rows of an expert")
    axes.set_ylabel("ns for each weight element (dotted: the machine's limit)")
    axes.set_title(f"{machine.name}, {machine.isa}")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as e:
        raise PictureError(f"the picture cannot be written to {path}: {e}", hint="give a .png file") from e
