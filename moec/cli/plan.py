"""``moec plan MODEL --ranks N``: the ways to spread a model over ranks, and what each costs a rank."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moec.cli.console import emit, out
from moec.sizes import size_text

if TYPE_CHECKING:
    from moec.parallel.planner import Folding, ModelFacts


def facts(text: str, dtype: str | None) -> ModelFacts:
    """The sizes of a model, whose weights are never made.

    Raises:
        MoecError: It cannot be read, or has no stacked experts.
    """
    from moec.cli import hugging_face
    from moec.cli.model import dtype_of, load_model
    from moec.parallel.planner import ModelFacts

    path = Path(text).expanduser()
    if not path.exists():
        return ModelFacts.of(load_model(text, dtype=dtype).model)
    file = path / "config.json" if path.is_dir() else path
    return ModelFacts.of(hugging_face.on_meta(config_at(text), dtype_of(dtype), file))


def config_at(text: str) -> Any:
    """The configuration object of a folder's or file's ``config.json``.

    Raises:
        MoecError: It cannot be read.
    """
    from moec.cli import hugging_face
    from moec.cli.model import read_config

    path = Path(text).expanduser()
    file = path / "config.json" if path.is_dir() else path
    return hugging_face.config_from(read_config(file), file)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A local Hugging Face folder, its config.json, or package.module:factory."
        ),
    ],
    ranks: Annotated[int, typer.Option(min=1, help="Processes, one a device.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the ranks are on, as many on each.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each rank in a step.")] = 1024,
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16; the model's own by default.")] = None,
    most: Annotated[int, typer.Option("--show", min=1, help="Foldings to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """List how attention and experts can be folded over ranks, with bytes of weights and of messages per rank."""
    from moec.parallel.planner import foldings

    found = foldings(facts(model, dtype), ranks, tokens=tokens, nodes=nodes)
    if as_json:
        emit(json.dumps([{**asdict(f), "runs": f.runs} for f in found]))
        return
    _show(found[:most], len(found))


def _show(found: list[Folding], count: int) -> None:
    from rich.table import Table

    table = Table(title=f"{count} foldings, those that send least first", title_justify="left")
    for name in ("attention", "experts", "weights", "dispatch", "forward sends", "gradients send", "plan"):
        table.add_column(name)
    for f in found:
        table.add_row(
            f"dp {f.dp} x tp {f.tp}", f"edp {f.edp} x ep {f.ep} x etp {f.etp}", size_text(f.memory), f.form,
            size_text(f.forward_sent), size_text(f.gradient_sent), f.reason or f.plan,
        )  # fmt: skip
    out().print(table)
