"""``moec passes [NAME]``: which passes and pipelines there are, and the reference page of one."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from moec.cli.console import emit, out


def passes(
    name: Annotated[
        str | None, typer.Argument(help="A pass or pipeline to describe; without it, all are listed.")
    ] = None,
) -> None:
    """List the passes and pipelines, or describe one."""
    from moec.passes.pipelines import PIPELINES
    from moec.passes.registry import all_passes, get_pass

    if name is None:
        _list(all_passes(), PIPELINES)
    elif name in PIPELINES:
        emit(f"{name}: pipeline\n\n{PIPELINES[name]}")
    else:
        emit(describe(get_pass(name)))


def _list(found: dict[str, Any], pipelines: dict[str, str]) -> None:
    table = Table(title="passes", title_justify="left", title_style="bold")
    for column in ("name", "class", "options", "summary"):
        table.add_column(column, overflow="fold")
    for name, cls in found.items():
        options = ", ".join(f"{n}={v}" for n, _, v in options_of(cls))
        table.add_row(escape(name), class_text(cls), escape(options) or "-", escape(cls.summary))
    out().print(table)
    table = Table(title="pipelines", title_justify="left", title_style="bold")
    table.add_column("name")
    table.add_column("passes", overflow="fold")
    for name, text in pipelines.items():
        table.add_row(escape(name), escape(text))
    out().print(table)


def class_text(cls: Any) -> str:
    """``bitwise``, or ``reorders (rel. error <= 1e-05)``."""
    text: str = cls.pass_class.value
    return f"{text} (rel. error <= {cls.tolerance:g})" if cls.tolerance else text


def options_of(cls: Any) -> list[tuple[str, str, str]]:
    """The options of a pass as (name, type, default), each as text."""
    rows = []
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            default = repr(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            default = repr(f.default_factory())
        else:
            default = "(required)"
        rows.append((f.name, f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type)), default))
    return rows


def describe(cls: Any) -> str:
    """The reference page of a pass as plain text."""
    lines = [f"{cls.name}: {class_text(cls)}", "", (inspect.getdoc(cls) or cls.summary).strip()]
    if rows := options_of(cls):
        lines += ["", "options:"] + [f"  {name}: {kind} = {default}" for name, kind, default in rows]
    return "\n".join(lines)
