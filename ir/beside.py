"""Experts of a rank's program that its layer did not choose: they stand beside, and need nothing that travels.

What a layer's own experts compute came out of a choice: their ids are made by ops of the moe dialect, wherever rows
travel. A shared expert's are not, so that the dataflow tells the two apart.
"""

from __future__ import annotations

from moec.ir.core import Graph, Op

EXPERTS = ("moe.experts", "moe.experts_backward")
_PIECES = frozenset({"moe.token_part"})
"""Ops of the moe dialect that no choice goes into."""


def makers(op: Op) -> set[Op]:
    """Every op that the operands of ``op`` are made by, directly or not."""
    found: set[Op] = set()
    stack = [op]
    while stack:
        for value in stack.pop().operands:
            if value.op is not None and value.op not in found:
                found.add(value.op)
                stack.append(value.op)
    return found


def is_beside(op: Op) -> bool:
    """Whether an op of experts stands beside the layer that its program is of."""
    ids = op.operands[EXPERTS.index(op.name) + 1].op
    if ids is None:
        return False
    return all(o.dialect == "torch" or o.name in _PIECES for o in (ids, *makers(ids)))


def own_experts(region: Graph) -> list[Op]:
    """The layer's own experts, those of every chunk, in their order."""
    return [op for op in region.ops if op.name in EXPERTS and not is_beside(op)]


def beside_experts(region: Graph) -> list[Op]:
    """Those that stand beside, in their order."""
    return [op for op in region.ops if op.name in EXPERTS and is_beside(op)]
