"""From claimed ops of the moe dialect to nodes of an fx graph that call moec's runtime ops."""

from __future__ import annotations

import operator
from typing import Any

import torch

from moec.backends.partition import BEGIN, RESUME, SPREAD, Claims, layer_inside
from moec.describe import is_shared
from moec.emit import LowerOp
from moec.ir.core import Op
from moec.ir.ops.moe_resume import begun_by
from moec.ir.types import TensorType, TokenType
from moec.options import CompileOptions
from moec.runtime import as_given, beside, regroup, staged  # noqa: F401  (registers ops of torch.ops.moec, as the next does)
from moec.runtime import ops as runtime_ops  # noqa: F401
from moec.runtime.programs import program_graph, register


def block_name(module: str, number: int) -> str:
    """The name of a block from the path of the module its expert GEMM ran in."""
    while module.endswith(".base_layer"):  # of an adapter around the experts
        module = module.removesuffix(".base_layer")
    return module.removesuffix(".experts") or f"block{number}"


def shared_name(module: str, block: str) -> str:
    """The name of a shared expert from the path of the module that its last GEMM ran in, and its block's name."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    owner = module.rpartition(".")[0]
    return owner if owner and owner != block and not block.startswith(f"{owner}.") else f"{block}.shared"


def _routed(op: Op) -> bool:
    """The ids of ``moe.experts`` come from a router that can choose nothing but experts of the layer.

    A region may give any number; attributes say top k of as many logits as the router has experts.
    """
    route = op.operands[1].op
    if route is None or route.name != "moe.route" or route.regions:
        return False
    logits = route.operands[0].type
    return isinstance(logits, TensorType) and logits.shape[1] == op.attrs["experts"]


def lowering(claims: Claims, options: CompileOptions, label: str = "") -> LowerOp:
    """The ``lower_op`` of ``moec.emit`` for the ops in ``claims``.

    Args:
        claims: Which backend takes which op.
        options: The caller's options.
        label: Name of the block for messages and counters; by default the module path of each op.
    """

    begun: dict[Op, tuple[list[Any], str]] = {}  # of layers in pieces: what they were begun with

    def _resumed(op: Op, graph: torch.fx.Graph, args: list[Any]) -> list[Any]:
        if isinstance(op.results[0].type, TokenType):
            return [graph.call_function(torch.ops.moec.resume_layer.default, (args[0],))]
        begin, _ = begun_by(op)
        assert begin is not None
        made = graph.call_function(torch.ops.moec.end_layer.default, (args[0], *begun[begin]))
        return [graph.call_function(operator.getitem, (made, i)) for i in range(len(op.results))]

    def lower(op: Op, graph: torch.fx.Graph, args: list[Any]) -> list[Any] | None:
        if op.name == "moe.backward_as":
            made, given = args
            node = graph.call_function(torch.ops.moec.experts_as.default, (made, *given.args))
            graph.erase_node(given)
            return [node]
        if op not in claims:
            return None
        if op.name == RESUME:
            return _resumed(op, graph, args)
        name = label or (shared_name(op.loc.module, "") if is_shared(op) else block_name(op.loc.module, 0))
        if op.name in (SPREAD, BEGIN):
            op.attrs["backend"] = claims[layer_inside(op)].name
        graph_of_op, looked_at = program_graph(op), op.name == "moe.experts" and _routed(op)
        program = register(graph_of_op, claims[op], options.backend_target, name, options.checks, looked_at)
        if op.name == BEGIN:
            begun[op] = args, program.key
            return [graph.call_function(torch.ops.moec.begin_layer.default, begun[op])]
        if op.name == SPREAD and len(op.results) > 1:
            several = graph.call_function(torch.ops.moec.experts_beside.default, (args, program.key))
            return [graph.call_function(operator.getitem, (several, i)) for i in range(len(op.results))]
        if op.name in ("moe.experts", SPREAD):
            return [graph.call_function(torch.ops.moec.experts.default, (*args[:3], args[3:], program.key))]
        if op.name == "moe.regroup":
            planned = graph.call_function(torch.ops.moec.regroup.default, (args, program.key))
            return [graph.call_function(operator.getitem, (planned, i)) for i in range(len(op.results))]
        routed = graph.call_function(torch.ops.moec.route.default, (args, program.key))
        return [graph.call_function(operator.getitem, (routed, i)) for i in (0, 1)]

    return lower
