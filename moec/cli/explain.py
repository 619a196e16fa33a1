"""``moec explain MODEL``: every MoE block, what was made of it, and why not more."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.cli.console import emit, err, out
from moec.ir.errors import MoecError


class NoMoEError(MoecError):
    """The model has no MoE block."""

    code = "no-moe"


def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A local Hugging Face folder, its config.json (with --random-weights), or package.module:factory.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the example input.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Tokens a sequence.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16; the model's own by default.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Make the weights up instead of reading them.")
    ] = False,
    show_ir: Annotated[bool, typer.Option("--ir", help="Also print the IR of the first fused block.")] = False,
) -> None:
    """List every MoE block of a model: its router, experts, what was fused, and who runs it or why not."""
    from moec.api import explain as explain_model
    from moec.cli.model import load_model

    loaded = load_model(model, batch=batch, seq=seq, dtype=dtype, random_weights=random_weights)
    report = explain_model(loaded.model, loaded.args, loaded.kwargs)
    if as_json:
        emit(report.to_json())
    elif report.layers:
        out().print(report.table())
        if show_ir and (block := next((b for b in report.layers if b.fused), None)):
            emit(f"\n// {block.name}, as raised\n{block.ir_before}\n\n// as compiled\n{block.ir_after}")
    if not report.layers:
        for line in report.remarks:
            err().print(str(line), markup=False, soft_wrap=True)
        raise NoMoEError(
            f"no MoE block was found in {model}",
            hint="torch.compile(model, backend='moec') still works and leaves it all to PyTorch",
        )
    for line in report.lines():
        err().print(line, markup=False, soft_wrap=True)
