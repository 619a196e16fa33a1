"""What a program sends to its experts and home again, read from its dataflow."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.beside import own_experts
from moec.ir.core import Graph, Op
from moec.ir.types import TensorType
from moec.passes.overlap.order import is_start, needs


@dataclass(frozen=True)
class Traffic:
    """Rows of a program.

    Attributes:
        there_bytes: Of a row on its way to the experts, all that travels for it together.
        back_bytes: Of a row on its way home.
        there_messages: Collectives on the way there that bring rows.
        back_messages: Collectives on the way home.
    """

    there_bytes: float
    back_bytes: float
    there_messages: int
    back_messages: int


def row_bytes(op: Op) -> float | None:
    """Bytes of a row that a start sends; None where the row's width is not known."""
    t = op.operands[0].type
    if not isinstance(t, TensorType) or any(not d.is_Integer for d in t.shape[1:]):
        return None
    width = 1
    for d in t.shape[1:]:
        width *= int(d)
    return width * t.dtype.bits / 8


def traffic(region: Graph) -> Traffic | None:
    """The traffic of a program that sends a row for every slot; None where it sends otherwise or widths are unknown."""
    before = needs(region)
    experts = own_experts(region)
    rows = [op for op in region.ops if is_start(op) and op.group("rows") and not op.attrs.get("send_sizes")]
    if len(experts) != 1 or len(rows) < 2 or any(op.name != "comm.all_to_all.start" for op in rows):
        return None
    found = {op: row_bytes(op) for op in rows}
    there = [b for op, b in found.items() if experts[0] not in before[op]]
    back = [b for op, b in found.items() if experts[0] in before[op]]
    if None in there or None in back:
        return None
    return Traffic(sum(filter(None, there)), sum(filter(None, back)), len(there), len(back))
