"""Tables about kernels for GPUs: how a layer is launched, and what each compiled kernel takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from rich.table import Table
from rich.text import Text


def tile_text(tile: Mapping[str, Any], form: str) -> str:
    """``64*3x256x64 8w 3s split 2``: blocks of rows and how many, outputs and inputs of a tile, warps, stages."""
    if form == "gemv":
        return f"{tile['block_n']}x{tile['block_k']} {tile['num_warps']}w"
    split = f" split {tile['split_k']}" if tile["split_k"] > 1 else ""
    rows = f"{tile['block_m']}*{tile['units']}" if tile.get("units", 1) > 1 else f"{tile['block_m']}"
    sizes = f"{rows}x{tile['block_n']}x{tile['block_k']}"
    return f"{sizes} {tile['num_warps']}w {tile['num_stages']}s{split}"


def launch_table(layers: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], title: str = "launches") -> Table:
    """How layers are launched, one row for each stretch of numbers of tokens.

    Args:
        layers: Name and launches, as ``BuiltProgram.describe`` gives them.
        title: Of the table.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("tokens", justify="right")
    for column in ("form", "up", "down"):
        table.add_column(column)
    for column in ("predicted, us", "roofline, us", "times"):
        table.add_column(column, justify="right")
    table.add_column("bound by")
    for name, launches in layers:
        for i, told in enumerate(launches):
            seconds = sum(s["seconds"] for s in told["steps"])
            limit = sum(s["limit_seconds"] for s in told["steps"])
            table.add_row(
                Text(name if i == 0 else ""),
                f"to {told['tokens']}",
                told["form"],
                tile_text(told["up"], told["form"]),
                tile_text(told["down"], told["form"]),
                f"{seconds * 1e6:.1f}",
                f"{limit * 1e6:.1f}",
                f"{seconds / limit:.2f}" if limit else "",
                told["bound"],
                end_section=i + 1 == len(launches),
            )
    return table


def kernel_table(told: Mapping[str, Any]) -> Table:
    """What every kernel of an artifact takes of the hardware, and its time in the largest call that it is for."""
    table = Table(title=f"kernels for {told['target']}", title_justify="left", title_style="bold")
    table.add_column("program", overflow="fold")
    table.add_column("kernel")
    table.add_column("constants", overflow="fold")
    for column in ("regs", "spills", "shared", "resident", "tokens", "predicted, us", "roofline, us"):
        table.add_column(column, justify="right")
    table.add_column("matrix instructions", overflow="fold")
    for program in told["programs"]:
        for i, kernel in enumerate(program["kernels"]):
            constants = ", ".join(f"{k}={v}" for k, v in kernel["constants"].items())
            mma = ", ".join(f"{count} {name}" for name, count in kernel["mma"].items())
            numbers = [str(kernel[key]) for key in ("registers", "spills", "shared", "occupancy")] + _expected(kernel)
            names = Text(program["name"] if i == 0 else ""), Text(PurePosixPath(kernel["code"]).stem)
            last = i + 1 == len(program["kernels"])
            table.add_row(*names, Text(constants), *numbers, Text(mma), end_section=last)
    return table


def _expected(kernel: Mapping[str, Any]) -> list[str]:
    """Tokens, predicted and least microseconds; a kernel that no limit is known for has none."""
    told = kernel.get("expected")
    if not told:
        return ["", "", ""]
    seconds, limit = told["seconds"] * 1e6, told["limit_seconds"] * 1e6
    return [str(told["tokens"]), f"{seconds:.1f}", f"{limit:.1f}" if limit else ""]
