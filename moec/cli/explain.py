"""``moec explain MODEL``: every MoE block, what was made of it, and why not more."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.console import emit, err, out
from moec.ir.errors import MoecError

if TYPE_CHECKING:
    from moec.cli.model import LoadedModel
    from moec.gpu_plans import GpuPlan
    from moec.report import Report


class NoMoEError(MoecError):
    """The model has no MoE block."""

    code = "no-moe"


def _show_plans(plans: Sequence[GpuPlan], target: str) -> None:
    """How the layers would be launched on a GPU."""
    from moec.cli.gpu_tables import launch_table

    layers = []
    for plan in plans:
        more = f" (and {len(plan.blocks) - 1} more)" if len(plan.blocks) > 1 else ""
        if plan.launches:
            layers.append((plan.blocks[0] + more, plan.launches))
        else:
            err().print(f"{plan.blocks[0]}{more}: no kernels for {target}: {plan.reason}", markup=False, soft_wrap=True)
    if layers:
        out().print(launch_table(layers, f"experts on {target}: predicted from its data sheet"))


def _explain(loaded: LoadedModel, text: str, target: str) -> Report:
    """The report; where the model itself cannot run on its example input, an error that says so."""
    import torch

    from moec.api import explain as explain_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")  # Dynamo's advice to authors of the model
        try:
            return explain_model(loaded.model, loaded.args, loaded.kwargs, target=target)
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
    target: Annotated[
        str, typer.Option(help="cuda:sm90, hip:gfx942, ...: how its layers would be launched there; cpu:avx512, ...")
    ] = "cpu",
    ranks: Annotated[
        int, typer.Option(min=0, help="Also how long rows of its layers would travel between so many ranks.")
    ] = 0,
    topology: Annotated[str, typer.Option(help="The machine of these ranks, as moec simulate has them.")] = "8xh100",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each of these ranks.")] = 4096,
) -> None:
    """List every MoE block of a model: its router, experts, what was fused, and who runs it or why not."""
    from moec.backends.triton.launches.device import is_gpu
    from moec.cli.form_table import form_table, micro_batches, model_forms
    from moec.cli.model import load_model
    from moec.gpu_plans import gpu_plans
    from moec.predicted_table import predicted_table
    from moec.simulate.topology import load_topology
    from moec.targets import parse_target

    gpu = is_gpu(target)
    parse_target(target)
    if ranks:
        load_topology(topology).first(ranks)
    loaded = load_model(model, batch=batch, seq=seq, dtype=dtype, random_weights=random_weights)
    report = _explain(loaded, model, "cpu" if gpu else target)
    plans = gpu_plans(report, target) if gpu else []
    forms = model_forms(loaded.model, ranks, topology, tokens) if ranks else []
    both = micro_batches(loaded.model, ranks, topology, tokens) if ranks else ""
    planned = {name for plan in plans if plan.launches for name in plan.blocks}
    for entry in report.entries() if gpu else ():  # the model was traced here, and would run there
        entry.backend = ("triton" if entry.name in planned else "aten") if entry.fused else None
    if as_json:
        data = report.to_dict() | ({"target": target, "plans": [asdict(p) for p in plans]} if gpu else {})
        data |= {"forms": [asdict(f) for f in forms]} if forms else {}
        data |= {"micro_batches": both} if both else {}
        emit(json.dumps(data, indent=2, default=str))
    elif report.layers:
        out().print(report.table())
        if gpu:
            _show_plans(plans, target)
        elif predicted := predicted_table([*report.entries()]):
            out().print(predicted)
        if forms:
            out().print(
                form_table(forms, f"a layer's rows, {ranks} ranks of {topology}, {tokens} tokens each: predicted")
            )
        if both:
            out().print(f"two micro-batches of {tokens // 2} tokens, two layers: {both}", soft_wrap=True, markup=False)
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
