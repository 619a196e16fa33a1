"""Zero-compute experts of a loop: cheap functions of a token, which need no dispatch.

MoE++ (arXiv:2410.07348, section 3.1) puts zero, copy and constant experts beside the usual ones. Their rows need not
be gathered: ``Σ_slots w[t, s] · f(x[t])`` over the slots that chose expert e is ``f(x)[t]`` times the sum of those
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moec.ir.core import Op, Value
from moec.ir.torch_bridge import resolve_target
from moec.ir.types import DTYPES, TensorType, as_dim
from moec.passes.effects import is_pure
from moec.passes.matching import CASTS, arg, function, maker, peel, rank, same_dim, tensor
from moec.passes.raise_moe.activation import is_elementwise, keeps_rows_apart
from moec.passes.raise_moe.block import Emitter
from moec.passes.raise_moe.loop_branches import Branch, with_rows
from moec.passes.raise_moe.loop_experts import gemm_of
from moec.passes.raise_moe.loop_rows import Weighting
from moec.passes.raise_moe.refusal import Refusal

_NARROW = 16
"""A GEMM with at most so many outputs is cheaper on all tokens than a gather of some of them."""
_FILLED = ("zeros_like", "ones_like", "full_like")


@dataclass(frozen=True)
class Term:
    """One zero-compute expert.

    Attributes:
        branch: The expert.
        ops: Its program, from token rows to result, in graph order.
        rows: Its token rows.
        x: The matrix that they come from.
        finished: Its result.
        product: A value of the type that the weighted result has.
    """

    branch: Branch
    ops: list[Op]
    rows: Value
    x: Value
    finished: Value
    product: Value

    def write(self, emit: Emitter, total: Value, ids: Value, weights: Value) -> Value:
        """``total`` plus this expert's share.

        Args:
            emit: Where to write.
            total: ``[T, H]``.
            ids: ``[T, k]``; choices that do not count hold a number that is no expert's.
            weights: ``[T, k]``.
        """
        x, w, i, out, product = (tensor(v) for v in (self.x, weights, ids, total, self.product))
        assert x is not None and w is not None and i is not None and out is not None and product is not None
        env = {self.rows: self.x}
        for op in self.ops:
            types = [with_rows(r.type, self.branch.rows, x.shape[0]) for r in op.results]
            operands = [env.get(v, v) for v in op.operands]
            copy = Op(op.name, operands, types, attrs=op.attrs, groups=op.groups, names=[r.name for r in op.results])
            env.update(zip(op.results, emit.add(copy), strict=True))
        value = env.get(self.finished, self.finished)
        others = emit.call("aten.ne.Scalar", (ids, self.branch.expert), i.with_(dtype=DTYPES["i1"]))
        mine = emit.call("aten.masked_fill.Scalar", (weights, others, 0.0), w)
        share = emit.call("aten.sum.dim_IntList", (mine, [1], True), w.with_(shape=(w.shape[0], as_dim(1))))
        term = emit.call("aten.mul.Tensor", (value, share), out.with_(dtype=product.dtype))
        if product.dtype != out.dtype:
            term = emit.call("aten.to.dtype", (term, out.dtype), out)
        return emit.call("aten.add.Tensor", (total, term), out)


def read_terms(branches: list[Branch], rows: Value, x: Value, weighting: Weighting) -> Iterator[Term]:
    """The terms of experts that run one program.

    Args:
        branches: The experts; ``rows`` and ``weighting`` are those of the first.
        rows: Its token rows.
        x: Where they come from.
        weighting: The end of its program.

    Raises:
        Refusal: The program is not cheap, or no function of single rows.
    """
    first = branches[0]
    if maker(peel(weighting.finished, CASTS), "zeros_like") is not None:
        return
    ops = _program(first, rows, weighting.finished)
    _check(ops, rows)
    place = {op: n for n, op in enumerate(first.ops)}
    for branch in branches:

        def same(value: Value, branch: Branch = branch) -> Value:
            if value.op in place:
                return branch.ops[place[value.op]].results[value.index]
            return branch.outside[first.outside.index(value)] if value in first.outside else value

        finished, product = same(weighting.finished), same(weighting.product)
        yield Term(branch, [branch.ops[place[op]] for op in ops], same(rows), x, finished, product)


def _program(branch: Branch, rows: Value, finished: Value) -> list[Op]:
    own, seen = set(branch.ops), set()
    stack = [finished]
    while stack:
        value = stack.pop()
        if value is not rows and value.op in own and value.op not in seen:
            seen.add(value.op)
            stack.extend(value.op.operands)
    return [op for op in branch.ops if op in seen]


def _check(ops: list[Op], rows: Value) -> None:
    """Refuse a program that could mix rows, look at their positions, or cost as much as a real expert."""
    first = tensor(rows)
    assert first is not None
    held = {rows}
    for op in ops:
        target = op.attrs.get("target", op.name)
        if not is_pure(op) or _draws(op):
            raise Refusal(f"{target} in an expert of the loop draws numbers or writes memory", op)
        gemm = gemm_of(op, held)
        if gemm is not None:
            width = tensor(gemm.out)
            if width is None or not width.shape[1].is_Integer or int(width.shape[1]) > _NARROW:
                raise Refusal("an expert of the loop has a GEMM, but not an up and a down projection", op)
        elif not _row_by_row(op, held):
            raise Refusal(f"{target} in an expert of the loop may mix rows of different tokens", op)
        results = [r.type for r in op.results]
        if not all(isinstance(t, TensorType) and t.rank and same_dim(t.shape[0], first.shape[0]) for t in results):
            raise Refusal(f"{target} in an expert of the loop gives something else than rows", op)
        held |= set(op.results)


def _draws(op: Op) -> bool:
    return op.name == "torch.call" and torch.Tag.nondeterministic_seeded in resolve_target(op.attrs["target"]).tags


def _row_by_row(op: Op, held: set[Value]) -> bool:
    """True if every row of the result comes from the same row of the operands in ``held``."""
    name = function(op)
    mine = [v for v in op.operands if v in held]
    ranks = {rank(v) for v in mine}
    if name == "einsum":
        return _einsum_by_row(op, held)
    if name in _FILLED:
        return op.operands[0] in held
    if name == "unsqueeze":
        dim, n = arg(op, 1, "dim"), rank(op.operands[0]) + 1
        return isinstance(dim, int) and dim % n != 0
    aligned = len(ranks) == 1 and all(_beside(v, min(ranks)) for v in op.operands if v not in held)
    return (aligned or name in ("to", "type_as")) and (is_elementwise(op) or keeps_rows_apart(op))


def _beside(value: Value, rows_rank: int) -> bool:
    """True if broadcasting puts the same of ``value`` beside every row."""
    t = tensor(value)
    return t is None or t.rank < rows_rank or (t.rank == rows_rank and t.shape[0] == 1)


def _einsum_by_row(op: Op, held: set[Value]) -> bool:
    """``"b,bd->bd"``: one letter stands first in every operand that holds rows and in the result, and nowhere else."""
    equation, operands = arg(op, 0, "equation"), arg(op, 1, "tensors")
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return False
    left, result = equation.replace(" ", "").split("->")
    letter = result[:1]
    for text, value in zip(left.split(","), operands, strict=False):
        holds = text[:1] == letter and text.count(letter) == 1
        if not (holds if value in held else letter not in text):
            return False
    return bool(letter) and result.count(letter) == 1
