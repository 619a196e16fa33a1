"""From an exported program to one that calls embedded code, block by block.

The passes run on the whole program. A block that they fuse and that has no embedded code is left out of them: they run
again on the program as it was exported, and leave that block's calls alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.aot.addresses import with_addresses
from moec.aot.errors import AotError
from moec.aot.lowering import Embedding
from moec.backends.partition import Claims, Refusal
from moec.capture import from_exported
from moec.emit import to_exported
from moec.exported import report_of
from moec.ir.core import Graph, Location, Op
from moec.options import CompileOptions
from moec.passes.calls import packet
from moec.pipeline import run_pipeline
from moec.report import Report

OWN_NAMESPACES = ("aten", "prims", "prim", "quantized", "_quantized")
"""Of ops that every torch has."""
_REWRITTEN = ("moec::grouped_linear", "moec::scaled_linear")
"""The GEMMs of modules that ``moec.prepare`` rewrites. Passes raise them; none may be left in an artifact."""
_RAISING = ("raise-moe", "raise-shared-experts")
_MADE_BY = {"moe.route": ("fuse-routing",)}
"""The passes that make an op of the moe dialect, where they are not those that raise blocks."""


@dataclass
class Optimized:
    """One entry before it is compiled to code."""

    program: ExportedProgram
    before: str
    after: str


def optimize(
    program: ExportedProgram, embedding: Embedding, options: CompileOptions, report: Report, told: Callable[[str], None]
) -> Optimized:
    """Run the passes, and put embedded code where MoE ops are. The rest is plain ATen, which runs with torch alone.

    Args:
        program: It is not changed.
        embedding: Takes the code that is embedded.
        options: The pipeline and what it is told.
        report: What becomes of the program's blocks is added to it.
        told: Hears which layer is being written.

    Raises:
        AotError: The program has ops that torch alone does not have.
        MoecError: A pass failed.
    """
    check_ops(program)
    graph = from_exported(program)
    before = str(graph)
    ctx, raised = run_pipeline(graph, options)
    claims = embedding.claims(graph)
    made, last = _without_refused(program, embedding, options, graph, claims)
    check_left(from_exported(program) if last.refusals else made, [r.reason for r in claims.refusals])
    found = report_of(graph, _kept(claims, () if last.refusals else made.walk()), ctx, raised)
    report.graphs += 1
    report.layers += found.layers
    report.remarks += found.remarks
    if last.refusals:
        what = (f"{r.op.loc.module or r.op.name}: {r.reason}" for r in last.refusals)
        report.remarks += [f"{text}; the whole model runs as PyTorch would run it" for text in what]
        return Optimized(program, before, before)
    after = str(made)
    return Optimized(_emitted(made, program, embedding, told), before, after)


def _without_refused(
    program: ExportedProgram, embedding: Embedding, options: CompileOptions, graph: Graph, claims: Claims
) -> tuple[Graph, Claims]:
    """The program after passes that leave out what has no embedded code.

    Args:
        program: As it was exported.
        embedding: Says what has code.
        options: The pipeline and what it is told.
        graph: The program after all passes.
        claims: What of it has code.

    Returns:
        The program, and what of it has code. Something is refused only where no pass would leave it out.
    """
    left: set[tuple[str, Location]] = set()
    while claims.refusals:
        more = {(name, r.op.loc) for r in claims.refusals for name in _MADE_BY.get(r.op.name, _RAISING)}
        if more <= left:
            break
        left |= more
        graph = from_exported(program)
        run_pipeline(graph, options, left=frozenset(left))
        claims = embedding.claims(graph)
    return graph, claims


def _kept(claims: Claims, made: Iterable[Op]) -> Claims:
    """``claims`` without the experts that are not among ``made``, the ops of the program as it is compiled."""
    there = {op.loc for op in made if op.name == "moe.experts"}
    kept = Claims()
    kept.refusals = list(claims.refusals)
    for op, backend in claims.items():
        if op.name != "moe.experts" or op.loc in there:
            kept[op] = backend
        else:
            kept.refusals.append(Refusal(op, backend.name, "PyTorch runs what is around it"))
    return kept


def check_ops(program: ExportedProgram) -> None:
    """Refuse ops that somebody's Python code brings: torch alone cannot run them.

    Raises:
        AotError: There is one; it is named.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            op = node.target
            if not isinstance(op, torch._ops.OpOverload) or op._schema.name in _REWRITTEN:
                continue
            if op.namespace not in OWN_NAMESPACES:
                raise AotError(
                    f"the program calls {op.namespace}::{op._opname}, which torch alone does not have",
                    source=_line(node),
                    hint="an artifact runs without the code that defines it; export the model without that op",
                )


def check_left(graph: Graph, reasons: Sequence[str] = ()) -> None:
    """Refuse a program in which GEMMs of a rewritten module are left: nothing in an artifact runs them.

    Args:
        graph: What the artifact is to run.
        reasons: Why blocks have no kernel.

    Raises:
        AotError: There is one; its module is named.
    """
    for op in graph.walk():
        name = "::".join(packet(op).split("."))
        if name not in _REWRITTEN:
            continue
        who = f"the experts {op.loc.module or 'of a block without a name'}"
        if name == "moec::scaled_linear":
            raise AotError(
                f"{who} have weights in fp8, and no kernel for this target multiplies them",
                hint="compile for a GPU (--target cuda:sm90), or load the model with its weights dequantized",
            )
        why = f": {'; '.join(dict.fromkeys(reasons))}" if reasons else ""
        raise AotError(
            f"{who} are left to PyTorch, and torch alone does not have {name}{why}",
            hint="moec explain says why they are left",
        )


def _line(node: torch.fx.Node) -> str | None:
    """The last line of the user's code that made a node."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    return lines[-1].strip() if lines else None


def _emitted(
    graph: Graph, program: ExportedProgram, embedding: Embedding, told: Callable[[str], None]
) -> ExportedProgram:
    lifted = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None}
    lower = embedding.lower_op(lifted)
    done = 0

    def heard(op: Op, fx: torch.fx.Graph, args: list[Any]) -> Any:
        nonlocal done
        if op.name == "moe.experts":
            done += 1
            told(f"layer {done}")
        return lower(op, fx, args)

    return with_addresses(to_exported(graph, program, lower_op=heard), embedding.addressed)
