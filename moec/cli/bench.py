"""``moec bench out.moec``: how long an artifact takes to load, and to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moec.cli.console import emit, out


def bench(
    artifact: Annotated[Path, typer.Argument(metavar="FILE.moec")],
    sizes: Annotated[
        str | None, typer.Option(help="Values of the last size that varies, with commas between: 1,16,128.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each; the median is shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Time an artifact on made-up inputs."""
    from moec.artifact.timing import time_artifact

    found = time_artifact(artifact, sizes, repeats)
    if as_json:
        emit(json.dumps(found.to_dict(), indent=2))
        return
    emit(f"load {found.load_s * 1e3:.0f} ms, first call {found.first_s * 1e3:.0f} ms, {found.threads} threads")
    table = Table(title=f"{artifact.name}, median of {repeats}", title_justify="left", title_style="bold")
    for column in ("entry", "sizes", "ms", "tokens/s"):
        table.add_column(column, justify="left" if column in ("entry", "sizes") else "right")
    for row in found.rows:
        text = ", ".join(f"{name} {size}" for name, size in row.sizes.items()) or "fixed"
        table.add_row(
            row.entry, text, f"{row.seconds * 1e3:.2f}", f"{row.tokens / row.seconds:.0f}" if row.tokens else "-"
        )
    out().print(table)
