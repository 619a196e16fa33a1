"""From claimed ops of the moe dialect to nodes that call embedded code."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.aot.ops import torch_op
from moec.aot.region import Region
from moec.aot.regions import share_layers
from moec.aot.strides import outputs_as_rows, recorded_weights
from moec.backends.calls import UnsupportedError
from moec.backends.cpu.aot import Embedded, addressable, embed_experts, embed_regroup, embed_route
from moec.backends.partition import Claims, Refusal
from moec.backends.registry import get_backend
from moec.emit import LowerOp, emit_into
from moec.ir.core import Graph, Op
from moec.ir.opdef import op_def
from moec.runtime.programs import program_graph

Node = torch.fx.Node


class Embedding:
    """The embedded programs of an artifact.

    Args:
        target: ``cpu`` or ``cpu:LEVEL``.
        one_by_one: Names of weights of which a checkpoint holds the experts' matrices one by one.

    Attributes:
        addressed: Those of them in whose place a program now takes addresses, and how many.
        programs: By name; equal layers have one.
        calls: How many nodes call each.
        regions: Layers that are alike, by name.
    """

    def __init__(self, target: str, one_by_one: Collection[str] = ()) -> None:
        self.target, self.one_by_one = target, one_by_one
        self.addressed: dict[str, int] = {}
        self.programs: dict[str, Embedded] = {}
        self.calls: dict[str, int] = {}
        self.regions: dict[str, Region] = {}
        self._ops: dict[str, torch._ops.OpOverload] = {}
        self._names: Mapping[str, str] = {}

    @property
    def shims(self) -> dict[torch._ops.OpOverload, list[str]]:
        """The C functions of the ops, as Inductor's option ``custom_ops_to_c_shims`` takes them."""
        parts: dict[str, Embedded | Region] = {**self.programs, **self.regions}
        return {self._ops[name]: [part.declaration] for name, part in parts.items()}

    def claims(self, graph: Graph) -> Claims:
        """Which ops of the moe dialect have embedded code, and why others have none.

        A router that is a region needs none: it goes into the program as the calls that it is made of.
        """
        claims, cpu = Claims(), get_backend("cpu")
        for op in graph.walk():
            if op.dialect != "moe" or _is_region(op):
                continue
            try:
                self._embed(op, True, True)
                weights = recorded_weights(op) if op.name == "moe.experts" else None
                if weights is not None:
                    outputs_as_rows(op, weights)
            except UnsupportedError as reason:
                claims.refusals.append(Refusal(op, cpu.name, str(reason)))
            else:
                claims[op] = cpu
        return claims

    def lower_op(self, names: Mapping[str, str]) -> LowerOp:
        """The ``lower_op`` of ``moec.emit`` for every op that has embedded code.

        Args:
            names: Of the program's lifted inputs: the weight that each is.
        """
        self._names = names

        def lower(op: Op, graph: torch.fx.Graph, args: list[Any]) -> list[Any] | None:
            if op.name == "moe.experts":
                return self._experts(op, graph, args)
            if op.name == "moe.route":
                return self._route(op, graph, args)
            if op.name == "moe.regroup":
                return self._regroup(op, graph, args)
            return None

        return lower

    def share_layers(self, program: ExportedProgram) -> None:
        """Put calls in the places of layers that are alike; ``program`` is changed."""
        for region, op in share_layers(program):
            self.regions[region.name], self._ops[region.name] = region, op

    def _embed(self, op: Op, up_nk: bool, down_nk: bool, addressed: bool = False) -> Embedded:
        if op.name == "moe.route":
            return embed_route(op, self.target)
        if op.name == "moe.experts":
            return embed_experts(op, self.target, up_nk, down_nk, addressed)
        if op.name == "moe.regroup":
            return embed_regroup(op, self.target)
        raise UnsupportedError(f"there is no kernel for {op.name}")

    def _enter(self, op: Op, embedded: Embedded) -> torch._ops.OpOverload:
        self.programs[embedded.name] = embedded
        self.calls[embedded.name] = self.calls.get(embedded.name, 0) + 1
        found = self._ops[embedded.name] = torch_op(embedded, op)
        return found

    def _experts(self, op: Op, graph: torch.fx.Graph, args: list[Any]) -> list[Any]:
        program = _canonical(op)
        up, down = (args[sum(op.groups[:g])] for g in (3, 4))
        get = op_def(op.name).attr
        names = [self._names.get(a.name, "") for a in (up, down)]
        alone = all(u.name == op.name for i in (3, 4) for u in op.operands[sum(op.groups[:i])].users)
        addressed = alone and addressable(op) and all(n in self.one_by_one for n in names)
        if addressed:
            experts = get(op, "experts")
            self.addressed |= {names[0]: experts * (1 if get(op, "layout") == "single" else 2), names[1]: experts}
        small = sum(op.groups[3:5])
        forms = outputs_as_rows(op, [a.meta["val"] for a in args[3 : 3 + small]])
        embedded = self._embed(program, *forms, addressed)
        x, ids, weights = (_contiguous(graph, a) for a in args[:3])
        ids = _wide(graph, ids)
        params = list(args[3:])
        params[small:] = [_contiguous(graph, a) for a in params[small:]]
        return [graph.call_function(self._enter(program, embedded), (x, ids, weights, params))]

    def _route(self, op: Op, graph: torch.fx.Graph, args: list[Any]) -> list[Any]:
        if _is_region(op):
            return emit_into(op.regions[0], graph, args)
        program = _canonical(op)
        embedded = self._embed(program, True, True)
        used = [_contiguous(graph, a) for a in args[: embedded.schema.count("Tensor") - 2]]
        routed = graph.call_function(self._enter(program, embedded), tuple(used))
        return [graph.call_function(operator.getitem, (routed, i)) for i in (0, 1)]

    def _regroup(self, op: Op, graph: torch.fx.Graph, args: list[Any]) -> list[Any]:
        program = _canonical(op)
        ids = tuple(_wide(graph, _contiguous(graph, a)) for a in args)
        planned = graph.call_function(self._enter(program, self._embed(program, True, True)), ids)
        return [graph.call_function(operator.getitem, (planned, i)) for i in range(len(op.results))]


def _canonical(op: Op) -> Op:
    """The op in a graph of its own, so that equal layers are equal."""
    return next(o for o in program_graph(op).ops if o.name == op.name)


def _is_region(op: Op) -> bool:
    """Whether a router is made of torch's own calls."""
    return op.name == "moe.route" and bool(op.regions)


def _contiguous(graph: torch.fx.Graph, node: Node) -> Node:
    if node.meta["val"].is_contiguous():
        return node
    return _call(graph, torch.ops.aten.clone.default, node, memory_format=torch.contiguous_format)


def _wide(graph: torch.fx.Graph, ids: Node) -> Node:
    if ids.meta["val"].dtype == torch.int64:
        return ids
    return _call(graph, torch.ops.aten._to_copy.default, ids, dtype=torch.int64)


def _call(graph: torch.fx.Graph, target: Any, node: Node, **kwargs: Any) -> Node:
    made = graph.call_function(target, (node,), kwargs)
    made.meta["val"] = target(node.meta["val"], **kwargs)
    return made
