"""``moec backends [NAME]``: which backends there are, what of them works here, and the reference page of one."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moec.backends.base import Backend, StatusLine
from moec.cli.console import emit, out


def backends(
    name: Annotated[str | None, typer.Argument(help="A backend to describe; without it, all are listed.")] = None,
) -> None:
    """List the backends and what of them works on this machine, or describe one."""
    from moec.backends.registry import all_backends, get_backend

    if name is not None:
        emit(describe(get_backend(name)))
        return
    table = Table(title="backends", title_justify="left", title_style="bold")
    for column in ("name", "summary", "emit", "build", "run"):
        table.add_column(column, overflow="fold")
    for found in all_backends().values():
        summary = (inspect.getdoc(type(found)) or "").split("\n", 1)[0]
        stages = {line.stage: line for line in found.status()}
        table.add_row(escape(found.name), escape(summary), *(_cell(stages.get(s)) for s in ("emit", "build", "run")))
    out().print(table)


def _cell(line: StatusLine | None) -> Text:
    if line is None:
        return Text("-")
    if line.works:
        return Text("yes", "green")
    return Text(f"no: {line.detail}" if line.detail else "no", "yellow")


def describe(backend: Backend) -> str:
    """The reference page of a backend as plain text, with its state on this machine."""
    lines = [backend.name, "", (inspect.getdoc(type(backend)) or "").strip(), "", "on this machine:"]
    lines += [
        f"  {s.stage}: {'yes' if s.works else 'no'}{f' ({s.detail})' if s.detail else ''}" for s in backend.status()
    ]
    return "\n".join(lines)
