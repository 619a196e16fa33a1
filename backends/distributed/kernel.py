"""The kernel of ``moe.parallel_experts``: this rank's programs, with collectives by torch.distributed.

The experts of this rank run on the backend that the op names, as an op of their own; what lies around them is executed
by its definition. A rank without rows runs no kernel, and still takes part in every collective.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor

from moec.backends.base import STACKS, Kernel, placed
from moec.backends.distributed.order import combine_in_order, sum_in_order
from moec.backends.distributed.together import Gradients, Part, is_join, parts
from moec.backends.distributed.world import WORLD
from moec.backends.reference.interpreter import run_graph
from moec.backends.registry import get_backend
from moec.ir.comm_semantics import running_in
from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import op_def, torch_dtype
from moec.ir.staged import Staged, stops
from moec.ir.types import TensorType, Type
from moec.passes.base import PassContext
from moec.passes.dce import DeadCodeElimination

IN_ORDER = frozenset({"cpu"})
"""Backends whose kernels add a token's slots one by one."""


def _any_rows(type: Type) -> Type:
    """``type`` with a number of rows that is not known called R, so that chunks have the same program."""
    if not isinstance(type, TensorType) or not type.rank or type.shape[0].is_Integer:
        return type
    return type.with_(shape=(sympy.Symbol("R", integer=True), *type.shape[1:]))


def local_program(op: Op, result: Type) -> Graph:
    """A ``moe.experts`` (or the layer that a ``moe.experts_backward`` is of) as a program of its own."""
    skip = op.name == "moe.experts_backward"
    graph = Graph("program")
    args = [graph.add_arg(_any_rows(v.type), f"a{i}") for i, v in enumerate(op.operands[skip:])]
    attrs = {k: v for k, v in op.attrs.items() if k not in ("needs", "only")}
    made = Op(
        "moe.experts",
        args,
        [_any_rows(result)],
        attrs=attrs,
        regions=[r.clone() for r in op.regions],
        groups=op.groups[skip:],
    )
    graph.append(made)
    graph.append(Op("return", made.results, groups=(1,)))
    return graph


def for_needs(graph: Graph, needs: Sequence[bool]) -> Graph:
    """A backward program without what nobody needs; one output for each operand that needs a gradient.

    Args:
        graph: A backward region: its outputs are the gradients of all operands but ids.
        needs: One per operand, ids (the second) included.
    """
    copy = graph.clone()
    wanted = [need for i, need in enumerate(needs) if i != 1]
    end = copy.terminator
    outs = [v for v, need in zip(end.operands, wanted, strict=True) if need]
    end.erase()
    copy.append(Op("return", outs, groups=(len(outs),)))
    DeadCodeElimination().run(copy, PassContext())
    for op in list(copy.ops):
        if op.name == "moe.experts_backward":
            _narrow(copy, op)
    return copy


def _narrow(graph: Graph, op: Op) -> None:
    """Ask for the gradients that are used, and no others."""
    places = [i for i, need in enumerate(op.attrs["needs"]) if need]
    used = {i for i, r in zip(places, op.results, strict=True) if r.uses}
    kept = [r for r in op.results if r.uses]
    needs = tuple(i in used for i in range(len(op.attrs["needs"])))
    new = Op(
        op.name, op.operands, [r.type for r in kept], attrs={**op.attrs, "needs": needs},
        regions=[r.clone() for r in op.regions], groups=op.groups, loc=op.loc,
    )  # fmt: skip
    graph.insert_before(op, new)
    for old, fresh in zip(kept, new.results, strict=True):
        old.replace_all_uses_with(fresh)
    op.erase()


class ParallelKernel(Kernel):
    """Runs one rank's part. The kernel itself keeps no state between calls but the programs made for gradients."""

    def __init__(self, op: Op, target: str) -> None:
        self.op, self.target = op, target
        self.backend = get_backend(op.attrs.get("backend") or "reference")
        self.in_order = self.backend.name in IN_ORDER
        self._lock = threading.Lock()
        self._backwards: dict[tuple[bool, ...], tuple[Graph, dict[Value, Part]]] = {}
        self._kernels: dict[str, Kernel] = {}
        self._kernel_of: dict[Op, Kernel] = {}
        for inner in op.regions[0].ops:
            if inner.name == "moe.experts" and inner.attrs["experts"]:
                self._kernel(inner, inner.result.type)

    def _kernel(self, op: Op, result: Type) -> Kernel:
        """The kernel of some of this rank's experts; chunks that hold equally many share one."""
        with self._lock:
            if op not in self._kernel_of:
                program = local_program(op, result)
                key = str(program)
                if key not in self._kernels:
                    self._kernels[key] = self.backend.load(self.backend.lower(program, self.target))
                self._kernel_of[op] = self._kernels[key]
            return self._kernel_of[op]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        with running_in(WORLD):
            return run_graph(self.op.regions[0], inputs, self._execute)

    def begin(self, inputs: list[Tensor]) -> Staged:
        """The forward in pieces (``moe.begin``): run up to where it waits for rows the first time."""
        region = self.op.regions[0]
        with running_in(WORLD):
            return Staged(region, inputs, stops(region), self._execute_any)

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        given = [g for g in grads if g is not None]
        if len(given) < len(grads):  # no rank has one, as all run the same program
            return [t.new_zeros(t.shape) if n else None for t, n in zip(inputs, needs, strict=True)]
        graph, written = self._backward_for(needs)
        execute = partial(self._execute, gradients=Gradients(written))
        with running_in(WORLD):
            found = iter(run_graph(graph, [*given, *inputs], execute))
        return [next(found) if need else None for need in needs]

    def begin_backward(self, grads: list[Tensor], inputs: list[Tensor], needs: Sequence[bool]) -> Staged:
        """The backward in pieces, run up to where it waits for rows the first time; its results are those needed."""
        graph, written = self._backward_for(needs)
        execute = partial(self._execute_any, gradients=Gradients(written))
        with running_in(WORLD):
            return Staged(graph, [*grads, *inputs], stops(graph), execute)

    def _backward_for(self, needs: Sequence[bool]) -> tuple[Graph, dict[Value, Part]]:
        key = tuple(map(bool, needs))
        with self._lock:
            if key not in self._backwards:
                graph = for_needs(self.op.regions[1], key)
                self._backwards[key] = graph, parts(graph)
            return self._backwards[key]

    def _execute_any(self, op: Op, inputs: Sequence[Any], gradients: Gradients | None = None) -> list[Any]:
        found = self._execute(op, inputs, gradients)
        return op_def(op.name).evaluate(op, inputs, run_graph) if found is None else found

    def _execute(self, op: Op, inputs: Sequence[Any], gradients: Gradients | None = None) -> list[Any] | None:
        if op.name == "moe.experts":
            return self._experts(op, list(inputs))
        if op.name == "moe.experts_backward":
            return self._experts_backward(op, list(inputs), gradients)
        if gradients is not None and is_join(op):
            joined = gradients.joined(op)
            return None if joined is None else [joined]
        if op.name == "moe.combine" and self.in_order:
            assert isinstance(op.result.type, TensorType)
            rows, weights, plan = inputs
            return [combine_in_order(rows, weights, plan, torch_dtype(op.result.type.dtype.name))]
        return [sum_in_order(*inputs)] if op.name == "moe.sum_slots" and self.in_order else None

    def _experts(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        result = op.result.type
        assert isinstance(result, TensorType)
        if not len(inputs[0]):
            return [inputs[0].new_empty((0, int(result.shape[1])), dtype=torch_dtype(result.dtype.name))]
        return self._kernel(op, result).forward(inputs)

    def _experts_backward(self, op: Op, inputs: list[Tensor], gradients: Gradients | None) -> list[Tensor]:
        grad, *inputs = inputs
        needs = op.attrs["needs"]
        into: list[Tensor | None] = [None] * len(inputs)
        if gradients is not None:
            into = gradients.places(op, inputs, needs)
        only = op_def(op.name).attr(op, "only")
        if only is not None:
            return self._some_experts(op, grad, inputs, into, only)
        if not len(grad):
            return [
                t.new_zeros(t.shape) if place is None else place.zero_()
                for t, place, need in zip(inputs, into, needs, strict=True)
                if need
            ]
        found = self._kernel(op, op.operands[0].type).backward_into([grad], inputs, needs, into)
        return [g for g in found if g is not None]

    def _some_experts(
        self, op: Op, grad: Tensor, inputs: list[Tensor], into: list[Tensor | None], only: Sequence[int]
    ) -> list[Tensor]:
        """Gradients of a chunk that holds these of all experts: written into the whole, or taken out of one."""
        needs = op.attrs["needs"]
        places = [
            torch.empty_like(t) if need and place is None and i >= STACKS else place
            for i, (t, need, place) in enumerate(zip(inputs, needs, into, strict=True))
        ]
        if len(grad):
            found = self._kernel(op, op.operands[0].type).backward_into([grad], inputs, needs, places, only)
        else:
            nothing = [t.new_zeros(()).expand(t.shape) if need else None for t, need in zip(inputs, needs, strict=True)]
            found = placed(nothing, places, only)
        return [g if i < STACKS or into[i] is not None else g[list(only)] for i, g in enumerate(found) if g is not None]
