"""Facts about routing that hold whatever the tokens are, for passes that plan communication or memory."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.types import TensorType


@dataclass(frozen=True)
class EqualLoad:
    """Every token gives equally many slots to each group of neighbouring experts.

    Attributes:
        groups: Number of groups; group g holds the experts ``g * experts .. (g + 1) * experts - 1``.
        experts: Experts in a group.
        slots: Slots of one token in each group.
        by_slot: Slot j of every token goes to group ``j // slots``; else slots lie best first.
    """

    groups: int
    experts: int
    slots: int
    by_slot: bool

    def rows(self, tokens: sympy.Expr) -> sympy.Expr:
        """Rows of each group for that many tokens: no count has to be exchanged."""
        return tokens * self.slots


def equal_load_groups(op: Op) -> EqualLoad | None:
    """The groups of equal load of a ``moe.route``, or of the op whose ids come straight from one; None if none.

    Ids that anything changes on their way (sentinels, drops) say nothing.
    """
    if op.name in ("moe.experts", "moe.dispatch"):
        ids = op.operands[1]
        if op_def(op.name).attr(op, "sentinels") or ids.op is None or ids.op.name != "moe.route" or ids.index != 1:
            return None
        op = ids.op
    if op.name != "moe.route":
        return None
    get = op_def(op.name).attr
    logits = op.operands[0].type
    if op.regions or not get(op, "per_group") or not isinstance(logits, TensorType) or not logits.shape[1].is_Integer:
        return None
    groups = get(op, "groups")
    return EqualLoad(groups, int(logits.shape[1]) // groups, get(op, "per_group"), get(op, "by_group"))
