"""Gradients of weights that chunks of experts write where they belong, so that nobody puts them together.

A backward in chunks of experts makes the gradients of some of a rank's weights at a time, and joins them in the end
(``aten.cat``, or ``moe.join_experts`` where chunks hold experts in another order): a copy of all of them, as large as
the weights. Where each piece is needed for that alone, the whole is there from the first chunk on, and every chunk is
given its part of it to write; in another order the whole, of which it writes its experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moec.backends.cpu import recycle
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType
from moec.passes.calls import is_call

JOIN = "moe.join_experts"
WEIGHTS = 4
"""The first of the operands of a ``moe.experts_backward`` whose gradient is a sum over an expert's rows."""


@dataclass(frozen=True)
class Part:
    """One chunk's part of a gradient.

    Attributes:
        join: The op that joins all parts.
        first: Where the part begins, along the first dimension; where a chunk holds experts in another order, 0.
        last: Where it ends; where a chunk holds experts in another order, the end of all.
        whole: Where all parts end.
    """

    join: Op
    first: int
    last: int
    whole: int


def parts(graph: Graph) -> dict[Value, Part]:
    """The results of chunks' ``moe.experts_backward`` that are joined and used for nothing else."""
    found: dict[Value, Part] = {}
    for join in (op for op in graph.ops if is_join(op)):
        pieces, edges = join.operands, [0]
        for value in pieces:
            t = value.type
            if not (_is_weight(value) and isinstance(t, TensorType) and t.shape[0].is_Integer and len(value.uses) == 1):
                break
            edges.append(edges[-1] + int(t.shape[0]))
        else:
            mixed = join.name == JOIN
            found |= {
                v: Part(join, 0 if mixed else first, edges[-1] if mixed else last, edges[-1])
                for v, (first, last) in zip(pieces, pairwise(edges), strict=True)
            }
    return found


def is_join(op: Op) -> bool:
    """Whether an op puts together what chunks made."""
    return op.name == JOIN or (is_call(op, "aten.cat.default") and len(op.attrs["args"]) == 1)


def _is_weight(value: Value) -> bool:
    """Whether it is the gradient of some experts' weights."""
    op = value.op
    if op is None or op.name != "moe.experts_backward":
        return False
    places = [i + 1 for i, need in enumerate(op.attrs["needs"]) if need]  # the result's gradient is operand 0
    return places[op.results.index(value)] >= WEIGHTS


class Gradients:
    """The gradients of one call that is under way.

    Args:
        parts: What chunks write.
    """

    def __init__(self, parts: Mapping[Value, Part]) -> None:
        self.parts, self._wholes = parts, dict[Op, Tensor]()

    def places(self, op: Op, inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """Where a ``moe.experts_backward`` is to write, one per operand behind the first; None where it may choose.

        Args:
            op: The op.
            inputs: Its operands behind the first.
            needs: Which of them want a gradient.
        """
        results = iter(op.results)
        return [self._place(next(results), t) if need else None for t, need in zip(inputs, needs, strict=True)]

    def _place(self, value: Value, like: Tensor) -> Tensor | None:
        part = self.parts.get(value)
        if part is None:
            return None
        whole = self._wholes.get(part.join)
        if whole is None:
            shape = (part.whole, *like.shape[1:])
            strides = torch.empty_like(like, device="meta").stride()
            whole = (
                recycle.SHARED.empty(shape, strides, like.dtype)
                if like.is_cpu
                else torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
            )
            self._wholes[part.join] = whole
        return whole[part.first : part.last]

    def joined(self, op: Op) -> Tensor | None:
        """What ``op`` joins, where all its parts were written in place."""
        return self._wholes.pop(op, None)
