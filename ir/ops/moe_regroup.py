"""``moe.regroup``: which tokens of several micro-batches run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moec.ir.core import Graph, Op
from moec.ir.exprs import functions
from moec.ir.opdef import AttrDef, OpDef, OperandDef, register_op
from moec.ir.parallel_semantics import owners
from moec.ir.regroup import incidence, regroup
from moec.ir.types import TensorType, Type


@register_op
class Regroup(OpDef):
    """Deals the tokens of all micro-batches out anew, so that batches touch few experts, or few ranks.

    ``%there0, %there1, %home0, %home1 = moe.regroup [%ids0, %ids1] {experts = 8} : i64[A], i64[B], i64[A], i64[B]``
    Tokens are counted through all micro-batches, in order. ``there`` has the tokens of every batch, ascending; batches
    are as large as the micro-batches. ``home`` has, for the tokens of every micro-batch in order, where they lie among
    the rows of all batches, in order. So ``there``, one after the other, is a permutation of the tokens, and ``home``
    its inverse. One micro-batch may be cut: ``parts = n`` makes n batches of it, the first ones one token larger where
    n does not divide the tokens.

    The sum over batches of the distinct experts that their tokens chose is no larger than as they come, and small
    (:mod:`moec.ir.regroup`); with ``sizes``, that of the distinct ranks that hold these experts. Where it does not fall
    by the part that ``least`` names, tokens stay as they come. Which partition it is decides no result. Where a backend
    looks longer for layers that take longer, it knows them by ``expert_bytes``, and counts steps, not time: equal ids
    give equal batches.
    """

    name = "moe.regroup"
    operands = (OperandDef("ids", "many", "int[T_i, k] chosen experts; ids outside 0 .. E-1 mean none"),)
    attrs = (
        AttrDef("experts", "int", "number of experts E"),
        AttrDef("parts", "int", "batches that a single micro-batch is cut into; 0 for none", default=0),
        AttrDef("sizes", "any", "experts of every rank, where ranks are counted; () counts experts", default=()),
        AttrDef("expert_bytes", "int", "of an expert's weights: how long may be planned; 0 where unknown", default=0),
        AttrDef("least", "any", "((tokens, part of the sum), ...) ascending, to interpolate between", default=()),
    )
    results = ("there", "home")
    variadic_results = True

    def batches(self, op: Op) -> int:
        """Batches after the op."""
        return self.attr(op, "parts") or len(op.operands)

    def part_sizes(self, tokens: Any, parts: int) -> list[Any]:
        """Tokens of every part of ``tokens``, which may be a number, torch's ``SymInt`` or a sympy expression."""
        if isinstance(tokens, TensorType):
            return [functions()["FloorDiv"](tokens.shape[0] + parts - 1 - i, parts) for i in range(parts)]
        return [(tokens + parts - 1 - i) // parts for i in range(parts)]

    def infer(self, op: Op) -> Sequence[Type] | None:
        types = [v.type for v in op.operands if isinstance(v.type, TensorType)]
        if len(types) != len(op.operands) or not types:
            return None
        home = [t.shape[0] for t in types]
        parts = self.attr(op, "parts")
        there = self.part_sizes(types[0], parts) if parts else home
        return [TensorType.of("i64", n, device=types[0].device) for n in (*there, *home)]

    def verify(self, op: Op) -> None:
        types = [v.type for v in op.operands]
        if not types or not all(isinstance(t, TensorType) and t.rank == 2 and t.dtype.kind == "int" for t in types):
            self.fail(op, "ids must be matrices [T, k] of integers, one or more")
        parts, sizes, least = (self.attr(op, name) for name in ("parts", "sizes", "least"))
        if self.attr(op, "expert_bytes") < 0:
            self.fail(op, f"expert_bytes = {self.attr(op, 'expert_bytes')} must not be negative")
        if parts < 0 or (parts and len(types) > 1):
            self.fail(op, f"parts = {parts}: one micro-batch alone is cut")
        if sizes and sum(sizes) != self.attr(op, "experts"):
            self.fail(op, f"sizes {sizes} do not add up to {self.attr(op, 'experts')} experts")
        if len(op.results) != self.batches(op) + len(types):
            self.fail(op, f"{self.batches(op)} batches of {len(types)} micro-batches, but {len(op.results)} results")
        pairs = isinstance(least, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in least)
        if not pairs or [p[0] for p in least] != sorted({p[0] for p in least}):
            self.fail(op, f"least = {least} must be pairs (tokens, part), tokens ascending")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        sizes, parts, experts, least = (self.attr(op, name) for name in ("sizes", "parts", "experts", "least"))
        ids, device = torch.cat(list(inputs)), inputs[0].device
        if sizes:
            ids, experts = owners(ids, sizes), len(sizes)
        given = [len(t) for t in inputs]
        part = float(np.interp(len(ids), [t for t, _ in least], [p for _, p in least])) if least else 0.0
        batches = self.part_sizes(given[0], parts) if parts else given
        there = regroup(incidence(ids.cpu().numpy(), experts), batches, part)
        order = torch.from_numpy(np.concatenate(there))
        home = torch.empty_like(order)
        home[order] = torch.arange(len(order))
        return [t.to(device) for t in (*map(torch.from_numpy, there), *(h.clone() for h in home.split(given)))]
