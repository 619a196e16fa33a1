"""The export door: a ``torch.export`` program in, the same program with its MoE blocks as moec's ops out.

Unlike the torch.compile door, where only the blocks are captured, the whole program becomes one IR graph here, so that
passes may look across blocks. What no pass touches comes back as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.export import ExportedProgram

from moec.backends.partition import BEGIN, SPREAD, Claims, claim
from moec.blocks import fill_report
from moec.capture import from_exported
from moec.describe import is_shared, router_of
from moec.emit import to_exported
from moec.ir.core import Graph, Op
from moec.lowering import block_name, lowering, shared_name
from moec.options import CompileOptions
from moec.passes.base import PassContext, Remark
from moec.pipeline import run_pipeline
from moec.report import BlockReport, Report
from moec.session import publish


def optimize(program: ExportedProgram, **options: object) -> ExportedProgram:
    """Run moec's passes over a whole exported program.

    Args:
        program: From ``torch.export.export``; it is not changed, and the result shares its parameters.
        **options: Fields of :class:`moec.options.CompileOptions` (``passes``, ``backends``, ...).

    Returns:
        The program with ``moec::route`` and ``moec::experts`` where its blocks were. It runs where moec is imported.
        A program with a block that the pipeline leaves half fused comes back unchanged, with remarks.

    Raises:
        MoecError: Bad options, or a pass failed.
    """
    chosen = CompileOptions.from_dict(options)
    graph = from_exported(program)
    ctx, raised = run_pipeline(graph, chosen)
    claims = claim(graph, chosen.backends, chosen.target)
    report = report_of(graph, claims, ctx, raised)
    publish(report)
    if chosen.report is not None:
        chosen.report(report)
    if any(op.dialect == "moe" and op not in claims for op in graph.ops):
        return program
    return to_exported(graph, program, lower_op=lowering(claims, chosen))


def report_of(graph: Graph, claims: Claims, ctx: PassContext, raised: str) -> Report:
    """What passes and backends made of every block of a whole program.

    Args:
        graph: After the pipeline.
        claims: Who takes which op.
        ctx: The pipeline's context, with its remarks.
        raised: The graph's text before anything was fused.
    """
    missed = [r for r in ctx.remarks if r.kind == "missed"]
    unseen = {(r.module, r.source): r for r in reversed(missed) if r.pass_name == "raise-moe" and r.module}
    report = Report(graphs=1, remarks=[str(r) for r in missed if r not in unseen.values()])
    shared: list[tuple[int, Op]] = []  # with how many blocks stand before it
    for op in graph.ops:
        if (found := unseen.pop((op.loc.module, op.loc.source), None)) is not None:
            _add_unseen(report, found)
        if is_shared(op):
            shared.append((len(report.layers), op))
        elif op.name in ("moe.experts", SPREAD, BEGIN):
            report.layers.append(_block(op, block_name(op.loc.module, len(report.layers)), claims, raised))
        elif op.name == "moe.combine":
            name = block_name(op.loc.module, len(report.layers))
            report.layers.append(BlockReport(name, recognised=True, reason="the pipeline leaves it unfused"))
    for before, op in shared:
        owner = _owner(report.layers, before, op.loc.module)
        owner.shared.append(_block(op, shared_name(op.loc.module, owner.name), claims, raised))
    if not report.layers:
        report.remarks.append("no MoE block was found in the program")
    return report


def _add_unseen(report: Report, remark: Remark) -> None:
    """Add a block that was not raised, or what is said of another part of one that is there."""
    name = block_name(remark.module, len(report.layers))
    known = next((b for b in report.layers if b.name == name), None)
    if known is None:
        report.layers.append(BlockReport(name, reason=remark.message, source=remark.source or None))
    else:
        known.remarks.append(remark.message)


def _block(op: Op, name: str, claims: Claims, raised: str) -> BlockReport:
    block = BlockReport(name, source=op.loc.source or None)
    if op not in claims:
        block.reason = f"no backend takes {op.name}: " + "; ".join(claims.reasons(op))
    route = router_of(op)
    fill_report(block, [op] if route is None else [route, op], claims)
    block.ir_before = raised
    return block


def _owner(blocks: Sequence[BlockReport], before: int, module: str) -> BlockReport:
    """The block of a shared expert that ran in ``module``: the one it lies in, else the nearest in the program."""
    around = [b for b in blocks if module.startswith(f"{b.name}.")]
    return around[0] if around else blocks[min(before, len(blocks) - 1)]
