"""``moec simulate``: how long a layer's program takes on a machine that is not here, and what is left exposed."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from moec.cache import write_atomic
from moec.cli.console import emit, out
from moec.cli.opt import FileError, read_source
from moec.sizes import size_text

if TYPE_CHECKING:
    from moec.ir.core import Graph
    from moec.parallel.plan import Plan
    from moec.simulate.attention import Prompts
    from moec.simulate.report import Report

_MOST_RANKS = 16


def simulate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN.moe|config.json",
            help="IR text (one graph for all ranks, or one a rank; `-` reads stdin), or a Hugging Face config.json.",
        ),
    ],
    topology: Annotated[str, typer.Option(help="The machine: a preset, or a .json file.")] = "8xh100",
    plan: Annotated[str, typer.Option(help="As moec.parallelize takes it: 'ep=8,form=gather'.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each rank in a step.")] = 4096,
    skew: Annotated[
        str, typer.Option(help="Which experts tokens choose: balanced, uniform, zipf:1.2, or a .json file of counts.")
    ] = "balanced",
    pipeline: Annotated[
        list[str] | None,
        typer.Option("-p", "--passes", help="Passes after the plan's; several times to compare, '' for none."),
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help="What another symbol of the graph is: s0=128.")] = None,
    attention: Annotated[
        int, typer.Option(min=0, help="Put a config's attention before its experts, on prompts of so many tokens.")
    ] = 0,
    layers: Annotated[int, typer.Option(min=1, help="Layers of a config's model, with --attention.")] = 1,
    micro_batches: Annotated[
        int, typer.Option(min=1, help="Parts of the tokens that go through the layers one by one, with --attention.")
    ] = 1,
    training: Annotated[bool, typer.Option("--training", help="Run the layers' backward programs too.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of choices that are drawn.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of a config's model: f32, bf16 or f16; its own by default.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto or Chrome here (JSON).")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the timeline here (PNG; needs matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    remarks: Annotated[bool, typer.Option("--remarks", help="Print what passes did or refused to stderr.")] = False,
) -> None:
    """Simulate a step of an expert-parallel layer: time, exposed communication, load and bytes of every rank."""
    from moec.backends.registry import all_backends
    from moec.calibration.picture import require_matplotlib
    from moec.parallel.plan import Plan
    from moec.passes.registry import all_passes, parse_pipeline
    from moec.simulate.attention import Prompts
    from moec.simulate.chrome import chrome_trace
    from moec.simulate.picture import draw_timelines
    from moec.simulate.routing import Routing
    from moec.simulate.run import Setting, run_graphs
    from moec.simulate.topology import load_topology

    # Everything the user wrote is checked before anything runs.
    all_passes(), all_backends()  # a plug-in's ops are known once it is loaded
    pipelines = list(dict.fromkeys(pipeline or [""]))
    for text in pipelines:
        parse_pipeline(text)
    machine, wanted = load_topology(topology), Plan.parse(plan)
    prompts = Prompts(attention, layers, micro_batches)
    prompts.check(tokens)
    if training and attention:
        raise FileError("the backward of attention is not simulated", hint="leave --attention or --training out")
    setting = Setting(machine, wanted, Routing.parse(skew, seed), tokens // micro_batches, _sizes(size or []), training)
    if trace is not None and len(pipelines) > 1:
        raise FileError("a trace is of one pipeline", hint="give -p once, or --picture, which shows several")
    if picture is not None:
        require_matplotlib()
    graphs = _graphs(source, wanted, dtype, prompts)
    found = {text: run_graphs(graphs, setting, partial(parse_pipeline, text)) for text in pipelines}
    first = found[pipelines[0]]
    for remark in [r for outcome in found.values() for r in outcome.remarks] if remarks else []:
        print(remark, file=sys.stderr)
    title = f"{machine.name}, {len(first.report.ranks)} ranks, {tokens} tokens each, {skew}"
    if trace is not None:
        _write(trace, chrome_trace(first.timeline, title))
    if picture is not None:
        named = {text or "no further passes": outcome.timeline for text, outcome in found.items()}
        draw_timelines(named if len(found) > 1 else {title: first.timeline}, picture)
    if as_json:
        reports = {text: outcome.report.as_json() for text, outcome in found.items()}
        emit(json.dumps(reports if len(found) > 1 else first.report.as_json()))
    elif len(found) > 1:
        _compare({text: outcome.report for text, outcome in found.items()}, title)
    else:
        _show(first.report, title)


def _graphs(source: str, plan: Plan, dtype: str | None, prompts: Prompts) -> list[Graph]:
    from moec.ir.parser import parse
    from moec.ir.verifier import verify
    from moec.simulate.attention import attention_of, model_graphs
    from moec.simulate.errors import SimulationError
    from moec.simulate.layer import layer_graphs

    if source.endswith(".json") or Path(source).is_dir():
        from moec.cli.plan import config_at, facts

        if plan.ep == 1:
            raise SimulationError("a config.json says nothing of ranks", hint="--plan ep=8")
        sizes = facts(source, dtype)
        if not prompts.length:
            return layer_graphs(sizes, plan.ep)
        return model_graphs(sizes, attention_of(config_at(source)), prompts, plan.ep)
    if prompts.length:
        raise SimulationError("IR text holds its own attention", hint="--attention is for a config.json")
    text, name = read_source(source)
    graphs = parse(text, name)
    for graph in graphs:
        verify(graph)
    return graphs


def _sizes(given: list[str]) -> dict[str, int]:
    from moec.simulate.errors import SimulationError

    found = {}
    for part in given:
        name, equals, value = part.partition("=")
        if not (name and equals and value.isascii() and value.isdigit()):
            raise SimulationError(f"--size {part}: a size is NAME=NUMBER", hint="--size s0=128")
        found[name] = int(value)
    return found


def _write(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror or e}") from e


def _show(report: Report, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("rank", "ops ms", "waiting ms", "comm ms", "hidden", "rows of experts", "sends"):
        table.add_column(name, justify="right")
    shown = sorted(range(len(report.ranks)), key=lambda r: -report.ranks[r].compute_s)[:_MOST_RANKS]
    for rank in sorted(shown):
        r = report.ranks[rank]
        table.add_row(
            str(rank), f"{r.compute_s * 1e3:.3f}", f"{r.exposed_s * 1e3:.3f}", f"{r.comm_s * 1e3:.3f}",
            f"{r.hidden:.0%}", str(r.rows), size_text(r.sent),
        )  # fmt: skip
    out().print(table)
    if len(shown) < len(report.ranks):
        out().print(f"the {len(shown)} of {len(report.ranks)} ranks that compute longest")
    out().print(
        f"step {report.seconds * 1e3:.3f} ms: {report.compute_s * 1e3:.3f} ms ops of the longest rank, "
        f"{report.exposed_s * 1e3:.3f} ms exposed ({report.exposed_s / max(report.seconds, 1e-30):.0%}); "
        f"fullest rank {report.imbalance:.2f} x the mean rows",
        soft_wrap=True,
    )


def _compare(reports: dict[str, Report], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("passes", overflow="fold")
    for name in ("step ms", "ops ms", "exposed ms", "first's step over it"):
        table.add_column(name, justify="right")
    steps = [r.seconds for r in reports.values()]
    for text, r in reports.items():
        table.add_row(
            Text(text or "none"), f"{r.seconds * 1e3:.3f}", f"{r.compute_s * 1e3:.3f}", f"{r.exposed_s * 1e3:.3f}",
            f"{steps[0] / max(r.seconds, 1e-30):.2f} x",
        )  # fmt: skip
    out().print(table)
