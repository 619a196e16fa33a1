"""``moec explain MODEL``: every MoE block, what was made of it, and why not more."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.console import emit, err, out
from moec.ir.errors import MoecError

if TYPE_CHECKING:
    from moec.cli.model import LoadedModel
    from moec.report import Report


class NoMoEError(MoecError):
    """The model has no MoE block."""

    code = "no-moe"


def _explain(loaded: LoadedModel, text: str) -> Report:
    """The report; where the model itself cannot run on its example input, an error that says so."""
    import torch

    from moec.api import explain as explain_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")  # Dynamo's advice to authors of the model
        try:
            return explain_model(loaded.model, loaded.args, loaded.kwargs)
        except MoecError:
            raise
        except Exception:
            try:
                with torch.no_grad():
                    loaded.model(*loaded.args, **loaded.kwargs)
            except Exception as e:
                raise MoecError(
                    f"{text} cannot be run on its example input, compiled or not: {type(e).__name__}: {e}",
                    hint="run again with --traceback to see where; a factory may return (module, args, kwargs)",
                ) from e
            raise


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
    from moec.cli.model import load_model
    from moec.predicted_table import predicted_table

    loaded = load_model(model, batch=batch, seq=seq, dtype=dtype, random_weights=random_weights)
    report = _explain(loaded, model)
    if as_json:
        emit(report.to_json())
    elif report.layers:
        out().print(report.table())
        if predicted := predicted_table([*report.entries()]):
            out().print(predicted)
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
