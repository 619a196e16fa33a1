"""``moec profile``: measure this machine for the cost model, or a model's routing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moec.cli.console import emit, err, out
from moec.ir.errors import nearest

if TYPE_CHECKING:
    from moec.cost import MachineProfile

_BUSY, _TOO_BUSY = 0.3, 0.5
"""Interrupted parts of calls from which a profile is doubted, and not trusted at all. Idle machines have 0.15."""


def profile(
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to measure with; all cores by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Element types to measure, with commas between.")] = "bf16,f32,f16",
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write the profile here instead of the cache directory.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw the GEMM curves (PNG; needs matplotlib).")] = None,
    routing: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Record what this model's routers do, instead of the machine.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="With --routing: a line of token numbers for every sequence.")
    ] = None,
    ranks: Annotated[
        str, typer.Option(help="With --routing: numbers of ranks to try regrouping for, with commas between.")
    ] = "",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="With --routing: make the weights up instead of reading them.")
    ] = False,
) -> None:
    """Measure this machine for the cost model, in about a minute. Stop other work first: it would be measured too.

    With --routing, run a model on some tokens and record what its routers choose.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from moec.calibration import calibrate
    from moec.calibration.picture import draw, require_matplotlib
    from moec.cost import ProfileError, save_profile
    from moec.cost.machine import ITEM_BYTES
    from moec.cost.store import to_json
    from moec.targets import cpu_cores

    if routing is not None:
        from moec.cli.routing import profile_model

        counts = [word.strip() for word in ranks.split(",") if word.strip()]
        if wrong := [word for word in counts if not word.isdigit() or int(word) < 2]:
            raise ProfileError(f"{wrong[0]!r} is no number of ranks", hint="--ranks 2,4")
        profile_model(routing, tokens, random_weights, tuple(map(int, counts)), as_json, out_file)
        return
    dtypes = [d.strip() for d in dtype.split(",")]
    for name in dtypes:
        if name not in ITEM_BYTES:
            raise ProfileError(f"cannot measure {name!r}; {nearest(name, list(ITEM_BYTES))}", hint="--dtype bf16,f32")
    if threads is not None and threads > cpu_cores():
        raise ProfileError(f"{threads} threads on {cpu_cores()} cores would measure waiting", hint="--threads N")
    if picture is not None:
        require_matplotlib()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        machine = calibrate(
            threads or cpu_cores(), dtypes, lambda what, done: bar.update(task, description=what, completed=done)
        )
    if machine.interrupted > _TOO_BUSY and out_file is None:
        raise ProfileError(
            f"other work interrupted {machine.interrupted:.0%} of the calls, so nothing is stored",
            hint="stop it and run again; --out FILE writes the profile all the same",
        )
    stored = save_profile(machine, out_file)
    if picture is not None:
        draw(machine, picture)
    if machine.interrupted > _BUSY:
        err().print(
            f"warning: other work interrupted {machine.interrupted:.0%} of the calls; stop it and measure again",
            soft_wrap=True,
        )
    if as_json:
        emit(to_json(machine))
        return
    for table in (_machine_table(machine), _curve_table(machine)):
        out().print(table)
    out().print(f"stored in {stored}", markup=False, soft_wrap=True)


def _machine_table(machine: MachineProfile) -> Table:
    table = Table(title=f"{machine.name}, {machine.cores} threads, {machine.isa}", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for team, rate in machine.bandwidth:
        table.add_row(f"reading memory, {_threads(team)}", f"{rate / 1e9:.1f} GB/s")
    for dtype, _, rate in machine.flops:
        table.add_row(f"multiply-adds in {dtype}, 1 thread", f"{rate / 1e9:.0f} GFLOP/s")
    table.add_row("a call", f"{machine.call_seconds * 1e6:.1f} µs")
    table.add_row(f"barriers, {_threads(machine.cores)}", f"{machine.barriers_at(machine.cores) * 1e6:.1f} µs")
    for o in machine.overheads:
        for team, seconds in o.rows:
            name = f"packing and combining {o.dtype}, {_threads(team)}"
            table.add_row(name, f"{1e-9 / seconds:.1f} GB/s" if seconds else "hidden")
        for team, seconds in o.tasks:
            table.add_row(f"a task in {o.dtype}, {_threads(team)}", f"{seconds * 1e6:.2f} µs")
    for count, link in machine.links:
        shown = f"{link.alpha_s * 1e6:.0f} µs, {link.bytes_per_s / 1e9:.2f} GB/s"
        table.add_row(f"links between {count} processes (gloo)", shown)
    return table


def _curve_table(machine: MachineProfile) -> Table:
    """What the GEMMs reach, of both limits: weights in GB/s, arithmetic in GFLOP/s."""
    from moec.cost.machine import ITEM_BYTES

    curves = [c for c in machine.curves if c.threads == machine.cores]
    table = Table(title=f"experts' GEMMs, {_threads(machine.cores)}", title_justify="left")
    for name in ("rows an expert", *(f"{c.dtype} {unit}" for c in curves for unit in ("GB/s", "GFLOP/s"))):
        table.add_column(name, justify="right")
    for rows, _ in curves[0].points:
        cells = []
        for curve in curves:
            ns = curve.seconds(rows) * 1e9
            cells += [f"{ITEM_BYTES[curve.dtype] / ns:.1f}", f"{2 * rows / ns:.0f}"]
        table.add_row(str(rows), *cells)
    return table


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)
