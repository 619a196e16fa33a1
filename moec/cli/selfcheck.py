"""``moec selfcheck``: do the kernels give what they should on the GPU of this machine?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from moec.cli.console import emit, err, out

if TYPE_CHECKING:
    from moec.selfcheck import Row


def selfcheck(
    target: Annotated[str, typer.Option(help="cuda or hip: the GPU that is here.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Run every kernel on the GPU of this machine and compare it with the reference."""
    from moec.selfcheck import SelfCheckError, device_here
    from moec.selfcheck import selfcheck as check

    if target.partition(":")[0] not in ("cuda", "hip"):
        raise SelfCheckError(f"there is no self-check for target {target!r}", hint="targets: cuda, hip")
    device = device_here()
    console = err()
    with console.status("checking ...") as status:

        def told(row: Row) -> None:
            status.update(f"{row.what}: {row.layer}, {row.dtype}, {row.tokens} tokens ...")

        rows = check(told)
    if as_json:
        emit(json.dumps({"device": str(device), "rows": [asdict(r) | {"ok": r.ok} for r in rows]}, indent=2))
    else:
        out().print(_table(rows, "Triton's interpreter" if device.type == "cpu" else _name()))
    if bad := [r for r in rows if not r.ok]:
        raise SelfCheckError(
            f"{len(bad)} of {len(rows)} checks failed, first {bad[0].what}: {bad[0].layer}, {bad[0].dtype}",
            hint="please report this table; until then use the backend 'aten'",
        )


def _name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _table(rows: Sequence[Row], where: str) -> Table:
    table = Table(title=f"moec selfcheck on {where}", title_justify="left", title_style="bold")
    for column in ("kernels", "layer", "type"):
        table.add_column(column, overflow="fold")
    for column in ("tokens", "error", "limit", "us"):
        table.add_column(column, justify="right")
    table.add_column("")
    for r in rows:
        good = Text(r.left or "ok", "yellow" if r.left else "green") if r.ok else Text(r.failure or "wrong", "red")
        table.add_row(
            r.what, r.layer, r.dtype, str(r.tokens), f"{r.error:.1e}", f"{r.limit:.0e}",
            f"{r.seconds * 1e6:.0f}" if r.seconds else "", good,
        )  # fmt: skip
    return table
