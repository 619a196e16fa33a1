"""``moec doctor``: what works on this machine and what would make more work."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from moec.cli.console import emit, out

_MARKS = {"ok": ("ok", "green"), "warn": ("warning", "yellow"), "missing": ("missing", "dim")}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say what works on this machine and what would make more work."""
    from moec.doctor import run_checks

    checks = run_checks()
    if as_json:
        emit(json.dumps({"checks": [asdict(c) for c in checks]}, indent=2))
        return
    table = Table(title="moec doctor", title_justify="left", title_style="bold")
    for column in ("what", "state", "detail", "to make more work"):
        table.add_column(column, overflow="fold")
    for check in checks:
        word, style = _MARKS[check.state]
        table.add_row(Text(check.name), Text(word, style), Text(check.detail), Text(check.hint))
    out().print(table)
