"""From a slice of a torch-level graph to runtime ops: retrace, capture, run the pipeline, claim, put back.

The contract:
1. A slice is replaced whole or not at all; what refuses leaves the graph as it was and a reason in the report.
2. Equal slices (same calls, sizes and types) are compiled once and written as often as they occur.
3. Retracing adds no guard that Dynamo has not made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec import autocast
from moec.backends.partition import BEGIN, SPREAD, Claims, claim
from moec.capture import graph_from_fx
from moec.capture.locations import location_of, module_path
from moec.computed_weights import Computed, computed_weights
from moec.describe import fill_experts, is_shared, route_text, shared_text
from moec.emit import emit_into
from moec.ir.core import Graph, Op
from moec.ir.errors import MoecError
from moec.joining import carried, find_joined, lend, make_way, take_back
from moec.lowering import block_name, lowering, shared_name
from moec.micro_batches import bring_together
from moec.options import CompileOptions
from moec.passes.base import BLOCK, SHARED_EXPERT, WITH_SHARED, PassContext, Remark
from moec.passes.carry_shared_experts import CarrySharedExperts
from moec.pipeline import run_pipeline
from moec.readiness.adapters import MERGE, adapter_inside
from moec.report import BlockReport
from moec.retrace import retrace
from moec.slicing import NotSliced, Slice
from moec.slicing import nodes as fx_nodes
from moec.slicing.cut import Refused
from moec.slicing.join import Joined

IN_BLOCK = "it is computed in its block, while the rows of that travel"
_RAISING = ("raise-moe", "raise-shared-experts", "fuse-experts")
MOE_OPS_LEFT = ("moe.dispatch", "moe.grouped_gemm", "moe.activation", "moe.combine")


@dataclass
class _Compiled:
    """What became of one distinct slice.

    Attributes:
        graph: The optimized graph, or None if the block stays with PyTorch.
        claims: Which backend takes which op.
        report: The block's report; its name and source belong to the first occurrence.
        remarks: What passes said.
    """

    graph: Graph | None
    claims: Claims
    report: BlockReport
    remarks: list[Remark] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        return self.graph is not None


@dataclass
class BlockCompiler:
    """Compiles the MoE blocks of the graphs of one ``torch.compile`` call.

    Attributes:
        options: The caller's options.
        reports: One per block occurrence, in order.
        computed: What the fused blocks read that is no parameter but computed in every call.
    """

    options: CompileOptions
    reports: list[BlockReport] = field(default_factory=list)
    computed: list[Computed] = field(default_factory=list)
    _seen: dict[Any, _Compiled] = field(default_factory=dict)

    def run(self, gm: GraphModule, instances: int = 1) -> bool:
        """Replace the blocks of one graph (not of its sub-graphs). True if anything changed.

        Args:
            gm: The graph.
            instances: How often the whole program calls it.
        """
        changed = False
        written: dict[Node, Node] = {}  # outputs of blocks that are replaced; a later block may begin with one
        told: dict[Node, BlockReport] = {}
        together = bring_together(gm, self.options, self._compile)
        alone = [p for p in together.pieces if not (isinstance(p, Slice) and p.parts)]
        joined = find_joined(gm, alone, self.options)
        inside: dict[Node, _Compiled] = {}  # shared experts that are computed in their blocks, by their anchors
        for piece in together.pieces:
            loc = location_of(piece.anchor.meta)
            block = None if piece.beside is None else told[piece.beside]
            name = block_name(loc.module, len(self.reports)) if block is None else shared_name(loc.module, block.name)
            if piece.anchor in inside:
                compiled = inside[piece.anchor]
            elif isinstance(piece, NotSliced):
                compiled = _Compiled(None, Claims(), BlockReport(name, reason=piece.reason))
            else:
                both = joined.get(piece.anchor)
                if isinstance(both, Joined) and (found := self._compile_joined(gm, both, written)) is not None:
                    piece = both.piece
                    compiled, inside[both.shared.anchor] = found
                else:
                    piece.inputs[:] = [written.get(n, n) for n in piece.inputs]
                    compiled = self._compile(piece)
            for part in (piece.parts if isinstance(piece, Slice) else ()) or (piece,):
                loc = location_of(part.anchor.meta)
                report = replace(compiled.report, name=name, source=loc.source or None, instances=instances)
                report.remarks, report.shared = together.remarks_of(part.anchor, compiled.remarks), []
                if isinstance(why := joined.get(part.anchor), Refused):
                    report.remarks.append(f"missed: {CarrySharedExperts.name}: the shared expert stays outside: {why}")
                if report.reason is not None:
                    report.reason += adapter_hint(gm, name if block is not None else loc.module)
                (self.reports if block is None else block.shared).append(report)
                told[part.anchor] = report
            if piece.anchor in inside:
                report.remarks.append(IN_BLOCK)
                continue
            if compiled.graph is not None and isinstance(piece, Slice):
                if (computed := computed_weights(compiled.graph, piece.inputs)) is not None:
                    self.computed.append(computed)
                written |= _replace(gm, piece, compiled.graph, compiled.claims, name, self.options)
                changed = True
        if changed:
            # No dead-code elimination here: fx takes `x[i] = y` for dead, and Dynamo's graphs are full of it.
            gm.graph.lint()
            gm.recompile()
        return changed

    def _compile(self, piece: Slice) -> _Compiled:
        key = _key(piece)
        if key not in self._seen:
            self._seen[key] = self._compile_new(piece)
        return self._seen[key]

    def _compile_joined(
        self, gm: GraphModule, both: Joined, written: dict[Node, Node]
    ) -> tuple[_Compiled, _Compiled] | None:
        """A block with its shared expert inside, and that alone; None where one of them has to stand alone."""
        both.shared.inputs[:] = [written.get(n, n) for n in both.shared.inputs]
        alone = self._compile(both.shared)
        if alone.graph is None:
            return None
        aliases = lend(gm, both)
        found = self._compile(both.piece)
        if found.graph is None or not carried(found.graph):
            take_back(gm, aliases)
            return None
        make_way(both)
        return found, alone

    def _compile_new(self, piece: Slice) -> _Compiled:
        report = BlockReport("")
        shared = piece.beside is not None
        # A shared expert is worth an op on the backend asked first: PyTorch runs it as well as a later one would.
        backends = self.options.backends[:1] if shared else self.options.backends
        try:
            graph = graph_from_fx(retrace(piece), "shared_expert" if shared else "block")
            cut_as = SHARED_EXPERT if shared else WITH_SHARED if piece.joined else BLOCK
            ctx, report.ir_before = run_pipeline(graph, self.options, cut_as)
        except MoecError as error:
            report.reason = str(error).replace("\n", "; ")
            return _Compiled(None, Claims(), report)
        report.ir_after = str(graph)
        claims = claim(graph, backends, self.options.backend_target)
        report.reason = unfinished(graph, claims, ctx)
        fill_report(report, graph.ops, claims)
        return _Compiled(None if report.reason else graph, claims, report, ctx.remarks)


def adapter_hint(gm: GraphModule, block: str) -> str:
    """What to say beside the reason for which a block is left, where an adapter lies in it; else ""."""
    found = adapter_inside(block, (module_path(n.meta.get("nn_module_stack")) for n in gm.graph.nodes))
    return "" if found is None else f"; {found} is an adapter: {MERGE}"


def _key(piece: Slice) -> Any:
    """What makes two slices the same piece of program: calls, arguments, sizes, types, strides."""
    number = {n: i for i, n in enumerate([*piece.inputs, *piece.nodes])}

    def plain(a: Any) -> Any:
        if isinstance(a, Node):
            return ("%", number[a])
        if isinstance(a, (list, tuple)):
            return (type(a).__name__, *(plain(v) for v in a))
        if isinstance(a, dict):
            return tuple((k, plain(v)) for k, v in a.items())
        return repr(a)

    def kind(n: Node) -> Any:
        v = fx_nodes.value(n)
        if isinstance(v, torch.Tensor):
            return (str(v.dtype), str(v.device), str(tuple(v.shape)), str(v.stride()))
        return str(v)

    calls = tuple(
        (n.op, n.target if n.op == "call_method" else id(n.target), plain(n.args), plain(n.kwargs)) for n in piece.nodes
    )
    return (
        (piece.beside is None, piece.joined),
        autocast.entered_at(piece.anchor),
        calls,
        tuple(kind(n) for n in piece.inputs),
        tuple(number[n] for n in piece.outputs),
    )


def unfinished(graph: Graph, claims: Claims, ctx: PassContext) -> str | None:
    """Why the block cannot go to the runtime ops, or None if it can."""
    experts = [op for op in graph.ops if op.name in ("moe.experts", SPREAD, BEGIN)]
    left = [op for op in graph.ops if op.name in MOE_OPS_LEFT]
    missed = [r.message for r in ctx.remarks if r.kind == "missed" and r.pass_name in _RAISING]
    if left or not experts:
        return "; ".join(missed) or f"the pipeline leaves {left[0].name if left else 'no MoE op'}"
    for op in graph.ops:
        if op.dialect == "moe" and op not in claims and op.name != "moe.backward_as":
            return f"no backend takes {op.name}: " + "; ".join(claims.reasons(op))
    return None


def fill_report(report: BlockReport, ops: Sequence[Op], claims: Claims) -> None:
    """Fill in what the moe ops of one block say."""
    for op in ops:
        if op.name == "moe.route":
            report.router = route_text(op)
            if report.reason is None and op not in claims and (refused := claims.reasons(op)):
                report.router += f", run by PyTorch ({'; '.join(refused)})"
        elif op.name in ("moe.experts", SPREAD, BEGIN):
            report.recognised = True
            fill_experts(report, op)
            if is_shared(op):
                report.router = shared_text(op)
            if report.reason is None:
                report.fused, report.backend = True, claims[op].name
        elif op.name in MOE_OPS_LEFT:
            report.recognised = True
    if report.recognised and report.router is None:
        report.router = "PyTorch"


def _replace(
    gm: GraphModule, piece: Slice, graph: Graph, claims: Claims, name: str, options: CompileOptions
) -> dict[Node, Node]:
    """Write the optimized graph in place of the slice; the new nodes by those whose place they take."""

    # no_grad: the user's saved-tensor hooks must not see the fake tensors that record the new nodes' values
    with gm.graph.inserting_before(piece.end.next), torch.no_grad():
        results = emit_into(
            graph, gm.graph, piece.inputs, lower_op=lowering(claims, options, name), root=gm, value_key="example_value"
        )
    inside = {*piece.nodes, *piece.checks}
    for old, new in zip(piece.outputs, results, strict=True):
        for user in list(old.users):
            if user not in inside:
                user.replace_input_with(old, new)
        if isinstance(new, Node):
            for key in ("nn_module_stack", "stack_trace"):
                if key in old.meta:
                    new.meta.setdefault(key, old.meta[key])
    for node in [*reversed(piece.checks), *reversed(piece.nodes)]:
        gm.graph.erase_node(node)
    return {old: new for old, new in zip(piece.outputs, results, strict=True) if isinstance(new, Node)}
