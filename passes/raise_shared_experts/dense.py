"""Dense GEMMs: one matrix for all rows, in the spellings that torch has for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moec.ir.core import Op, Value
from moec.passes.matching import CASTS, VIEWS, arg, function, peel, rank
from moec.passes.raise_moe.anchors import GATHERS, untranspose

CALLS = frozenset({"linear", "mm", "matmul", "addmm"})
_STOPS = GATHERS | {"bmm", "baddbmm", "einsum", "conv1d", "transpose", "permute", "t", "mT", "softmax", "_softmax"}
_STOPS |= {"scaled_dot_product_attention", "cumsum", "_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
"""What does not hand a row on as the same row: behind it, a GEMM is not the first one of this MLP."""


@dataclass(frozen=True)
class Dense:
    """One dense GEMM.

    Attributes:
        op: The call.
        rows: ``[..., K]``.
        weight: ``[N, K]`` (form ``nk``) or ``[K, N]`` (form ``kn``), as it lies.
        form: How it lies.
        bias: ``[N]``, or None.
        out: ``[..., N]``.
    """

    op: Op
    rows: Value
    weight: Value
    form: str
    bias: Value | None
    out: Value

    @property
    def plain(self) -> bool:
        """The weight is a tensor that the graph is given, or a cast of one: nothing that every call computes."""
        source = peel(self.weight, VIEWS | CASTS).op
        return source is None or source.name == "torch.get_attr"


def read_dense(op: Op | None) -> Dense | None:
    """The GEMM that ``op`` is, or None."""
    name = function(op)
    if op is None or name not in CALLS:
        return None
    bias = arg(op, 2, "bias") if name == "linear" else arg(op, 0, "self") if name == "addmm" else None
    first = 1 if name == "addmm" else 0
    rows, weight = arg(op, first), arg(op, first + 1, "weight" if name == "linear" else "mat2")
    if name == "addmm" and (arg(op, 3, "beta", 1) != 1 or arg(op, 4, "alpha", 1) != 1 or rank(bias) != 1):
        return None
    if rank(rows) < 2 or rank(weight) != 2:
        return None
    source, odd = untranspose(weight)
    # linear multiplies with the transposed weight, the others with the weight
    return Dense(op, rows, source, "nk" if odd != (name == "linear") else "kn", bias, op.results[0])


def feeders(down: Dense, outside: Collection[Op] = ()) -> list[Dense]:
    """The dense GEMMs whose results reach ``down``'s rows row by row, in graph order.

    Args:
        down: The GEMM.
        outside: Ops that are not looked behind.
    """
    found: dict[Op, Dense] = {}
    seen: set[Op] = set()
    stack = [down.rows]
    while stack:
        op = stack.pop().op
        if op is None or op in seen or op in outside:
            continue
        seen.add(op)
        if (dense := read_dense(op)) is not None:
            found[op] = dense
        elif op.name == "torch.call" and function(op) not in _STOPS:
            stack.extend(op.operands)
    graph = down.op.parent
    assert graph is not None
    return [found[op] for op in graph.ops if op in found] if len(found) > 1 else list(found.values())
