"""The ``torch.compile`` door: ``torch.compile(model, backend="moec", options={...})``.

Dynamo finds this function through the entry point group ``torch_dynamo_backends``. MoE blocks are raised here, on the
graph that Dynamo hands over, before autograd: afterwards the forward would already save what lies between the two
expert GEMMs, and nothing could be fused. All else goes on to the inner compiler unchanged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from moec import ddp
from moec.blocks import BlockCompiler
from moec.interleaving import CUSTOM_PASS, InterleavePass, Wanted, aot_eager, decide
from moec.ir.errors import MoecError
from moec.options import CompileOptions
from moec.report import Report
from moec.runtime.checks import MoecWarning
from moec.session import publish


class NotFusedError(MoecError):
    """A block is not fused and the caller asked for ``checks = "strict"``."""

    code = "not-fused"


def compile_blocks(gm: GraphModule, options: CompileOptions) -> Wanted:
    """Replace the MoE blocks of ``gm`` and of its nested graphs, in place.

    Args:
        gm: A torch-level graph with recorded fake values, as Dynamo hands it to a backend.
        options: What the caller asked for.

    Returns:
        Which of the graphs that autograd makes of it are to be put in order while layers wait for rows.
    """
    compiler = BlockCompiler(options)
    calls = count_calls(gm)
    for module in list(gm.modules()):
        if isinstance(module, GraphModule):
            compiler.run(module, calls.get(module, 1))
    report = Report(layers=compiler.reports, graphs=1)
    if not report.layers:
        report.remarks.append("no MoE block was found in the graph; PyTorch compiles all of it")
    if ddp.cuts_graphs():
        ddp.explain(report)
    report.remarks += dict.fromkeys(map(str, compiler.computed))
    wanted = decide(gm, options, report)
    _tell(report, options)
    if options.checks != "off" and not torch.is_grad_enabled():  # where gradients are wanted they have to be computed
        for text in dict.fromkeys(str(c) for c in compiler.computed if not c.cast_only):
            warnings.warn(text, MoecWarning, stacklevel=2)
    return wanted


def count_calls(gm: GraphModule) -> dict[GraphModule, int]:
    """How often each nested graph of ``gm`` is called by the graph that owns it."""
    calls: dict[GraphModule, int] = {}
    for owner in gm.modules():
        if not isinstance(owner, GraphModule):
            continue
        for node in owner.graph.find_nodes(op="get_attr"):
            body = getattr(owner, str(node.target), None)
            if isinstance(body, GraphModule):
                calls[body] = calls.get(body, 0) + len(node.users)
    return calls


def _tell(report: Report, options: CompileOptions) -> None:
    publish(report)
    if options.report is not None:
        options.report(report)
    left = [b for b in report.layers if not b.fused]
    if left and options.checks == "strict":
        b = left[0]
        raise NotFusedError(
            f"MoE block {b.name!r} is not fused: {b.reason}",
            source=b.source,
            hint='allow it with options={"checks": "warn"}; moec.explain shows all blocks',
        )
    if options.checks == "off":
        return
    for b in left:
        where = f" ({b.source})" if b.source else ""
        text = f"MoE block {b.name!r} runs as PyTorch would run it: {b.reason}{where}"
        warnings.warn(ddp.CUT if b.reason == ddp.CUT else text, MoecWarning, stacklevel=2)
    if not report.layers and _first_compile() and not ddp.cuts_graphs():
        warnings.warn(report.remarks[0], MoecWarning, stacklevel=2)


def _first_compile() -> bool:
    """False while Dynamo compiles a function again for other sizes: that it holds no MoE block has been told."""
    now = torch._guards.CompileContext.current_compile_id()
    return now is None or not now.frame_compile_id


def _inner(
    gm: GraphModule, example_inputs: Sequence[Any], options: CompileOptions, mode: str | None, wanted: Wanted
) -> Callable[..., Any]:
    if options.inner == "eager":
        return gm.forward
    if options.inner == "aot_eager":
        return aot_eager(gm, example_inputs, wanted)
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    patches = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # It orders a graph by sizes, which differ by rank, and collectives must come in one order on all ranks.
        patches["reorder_for_peak_memory"] = False
    if wanted.forward or wanted.backward:
        patches[CUSTOM_PASS] = (*get_custom_graph_passes(getattr(config, CUSTOM_PASS)), InterleavePass(wanted))
    return compile_fx(gm, list(example_inputs), config_patches=patches or None)  # type: ignore[return-value]


def moec_backend(
    gm: GraphModule,
    example_inputs: Sequence[torch.Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend function that Dynamo calls once per graph.

    Args:
        gm: The torch-level graph.
        example_inputs: Fake or real inputs, sizes first where they are dynamic.
        mode: ``torch.compile``'s mode, handed to Inductor.
        options: See :class:`moec.options.CompileOptions`.

    Raises:
        MoecError: A bad option, or an unfused block with ``checks = "strict"``.
    """
    chosen = CompileOptions.from_dict(options)
    return _inner(gm, example_inputs, chosen, mode, compile_blocks(gm, chosen))
