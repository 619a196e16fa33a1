"""The second table of a report: predicted times of its distinct layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from moec.report import BlockReport


def predicted_table(layers: Sequence[BlockReport]) -> Table | None:
    """One row for each distinct layer and number of tokens; None where nothing is predicted."""
    groups: dict[str, list[BlockReport]] = {}
    for block in layers:
        if block.predicted:
            groups.setdefault(repr(block.predicted), []).append(block)
    if not groups:
        return None
    first = next(iter(groups.values()))[0].predicted[0]
    source = "calibrated" if first["calibrated"] else "defaults; `moec profile` measures this machine"
    title = f"experts on the cpu backend, {first['isa']}: predicted ({source})"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("block", overflow="fold")
    for column in ("tokens", "threads", "ms", "limit, ms", "weights, MB", "GFLOP"):
        table.add_column(column, justify="right")
    table.add_column("bound by")
    for blocks in groups.values():
        more = f" (and {len(blocks) - 1} more)" if len(blocks) > 1 else ""
        for i, p in enumerate(blocks[0].predicted):
            table.add_row(
                Text(blocks[0].name + more if i == 0 else ""),
                str(p["tokens"]),
                str(p["threads"]),
                f"{p['seconds'] * 1e3:.3g}",
                f"{p['limit_seconds'] * 1e3:.3g}",
                f"{p['weight_bytes'] / 1e6:.4g}",
                f"{p['flops'] / 1e9:.3g}",
                p["bound"] + ("; PyTorch's GEMMs run it" if p["library"] else ""),
                end_section=i + 1 == len(blocks[0].predicted),
            )
    return table
