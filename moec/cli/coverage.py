"""``moec coverage``: the table of every MoE family of the installed transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.console import err, out

if TYPE_CHECKING:
    from moec.coverage.families import Family
    from moec.coverage.row import Row


def coverage(
    families: Annotated[str | None, typer.Option(help="Only these, with commas between.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here as JSON.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the page here.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    part: Annotated[str | None, typer.Option(help="I/N: every N-th family, from the I-th on.")] = None,
    backends: Annotated[str, typer.Option(help="Who may run MoE ops, in order.")] = "cpu,aten",
) -> None:
    """Compile a small model of every MoE family in transformers, and say what became of it. Minutes for all."""
    from moec.coverage.families import discover, select
    from moec.coverage.row import summary
    from moec.coverage.table import markdown, reason_lines, rich_table
    from moec.options import CompileOptions

    names = CompileOptions.from_dict({"backends": backends}).backends
    chosen = select(discover(), families, part)
    rows = _measured(chosen, jobs, names)
    out().print(rich_table(rows))
    for line in reason_lines(rows):
        out().print(line, markup=False, soft_wrap=True)
    if json_file is not None:
        text = json.dumps({"families": [r.to_dict() for r in rows], "summary": summary(rows)}, indent=2)
        json_file.write_text(text + "\n", encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(markdown(rows), encoding="utf-8")
    for line in summary(rows):
        out().print(line, markup=False, soft_wrap=True)


def _measured(chosen: list[Family], jobs: int, backends: tuple[str, ...]) -> list[Row]:
    """The rows, with a bar on stderr meanwhile."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from moec.coverage.pool import measure_all

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task("", total=len(chosen))
        running: list[str] = []

        def start(family: Family) -> None:
            running.append(family.name)
            bar.update(task, description=", ".join(running))

        def finish(row: Row) -> None:
            running.remove(row.family)
            bar.update(task, advance=1, description=", ".join(running))
            if not bar.console.is_terminal:  # a log shows no bar
                done = f"{int(bar.tasks[0].completed)} of {len(chosen)}"
                bar.console.print(f"{done}: {row.family}, {row.seconds:.0f} s", soft_wrap=True)

        return measure_all(chosen, jobs=jobs, backends=backends, on_start=start, on_row=finish)
