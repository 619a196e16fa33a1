"""``moec opt``: IR text in, passes over it, IR text out. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moec.cache import write_atomic
from moec.cli.console import emit
from moec.ir.errors import MoecError


class FileError(MoecError):
    """A file that cannot be read or written."""

    code = "file"


def opt(
    source: Annotated[str, typer.Argument(metavar="IN.moe", help="IR text; `-` reads stdin.")],
    pipeline: Annotated[
        str, typer.Option("-p", "--passes", help="Pipeline, such as 'fuse-routing,fuse-experts' or 'default'.")
    ] = "",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write here instead of stdout.")] = None,
    print_ir_after_all: Annotated[
        bool, typer.Option("--print-ir-after-all", help="Print the IR after every pass to stderr.")
    ] = False,
    dump_dir: Annotated[Path | None, typer.Option(help="Write the IR after every pass to this folder.")] = None,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Print the time of every pass to stderr.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print what every pass changed to stderr.")] = False,
    remarks: Annotated[bool, typer.Option("--remarks", help="Print what passes did or refused to stderr.")] = False,
    fuel: Annotated[int | None, typer.Option(min=0, help="Stop rewriting after this many rewrites.")] = None,
    target: Annotated[str, typer.Option(help="The machine the passes optimise for.")] = "cpu",
    routing: Annotated[
        Path | None, typer.Option(help="A routing profile (`moec profile --routing`) for passes.")
    ] = None,
    verify_only: Annotated[bool, typer.Option("--verify-only", help="Parse and verify, print nothing.")] = False,
) -> None:
    """Run passes over IR text."""
    from moec.backends.registry import all_backends
    from moec.ir.parser import parse
    from moec.ir.printer import print_graph
    from moec.ir.verifier import verify
    from moec.op_costs import op_costs
    from moec.passes import instruments as watch
    from moec.passes.base import PassContext
    from moec.passes.manager import PassManager
    from moec.passes.registry import all_passes, parse_pipeline
    from moec.routing.store import load_routing
    from moec.targets import parse_target

    # Everything the user wrote is checked before anything runs.
    all_passes(), all_backends()  # a plug-in's ops are known once it is loaded
    passes = parse_pipeline(pipeline)
    profile = None if routing is None else load_routing(routing)
    ctx = PassContext(target=parse_target(target), cost_model=op_costs(target), profile=profile)
    text, filename = read_source(source)
    graphs = parse(text, filename)
    for graph in graphs:
        verify(graph)
    if verify_only:
        return
    watchers: list[watch.Instrument] = []
    if print_ir_after_all:
        watchers.append(watch.PrintAfterAll())
    if dump_dir is not None:
        watchers.append(watch.DumpDir(dump_dir))
    if time_passes:
        watchers.append(watch.Timing())
    if stats:
        watchers.append(watch.Stats())
    try:
        for graph in graphs:
            PassManager(passes, instruments=watchers, fuel=fuel).run(graph, ctx)
    except OSError as e:
        raise FileError(f"{e.filename or dump_dir} cannot be written: {e.strerror or e}") from e
    finally:
        if remarks:
            for remark in ctx.remarks:
                print(remark, file=sys.stderr)
    result = "\n\n".join(print_graph(g).rstrip("\n") for g in graphs) + "\n"
    if output is None:
        emit(result)
        return
    try:
        write_atomic(output, result)
    except OSError as e:
        raise FileError(f"{output} cannot be written: {e.strerror or e}") from e


def read_source(source: str) -> tuple[str, str]:
    """IR text of a file, or of stdin for ``-``, and its name.

    Raises:
        FileError: It cannot be read.
    """
    if source == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8"), "<stdin>"
        except UnicodeDecodeError as e:
            raise FileError(f"stdin is not UTF-8 text (byte {e.start})") from e
    try:
        return Path(source).read_bytes().decode("utf-8"), source
    except OSError as e:
        raise FileError(f"{source} cannot be read: {e.strerror or e}", hint="give a .moe file, or - for stdin") from e
    except UnicodeDecodeError as e:
        raise FileError(f"{source} is not UTF-8 text (byte {e.start})", hint="give a .moe file") from e
