"""Reading the router of a ``moe.route`` op, for backends that generate a kernel from its sizes, types and kind."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from moec.backends.calls import UnsupportedError
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.types import TensorType


@dataclass(frozen=True)
class Router:
    """What a kernel is generated for.

    Attributes:
        logit, score, out: Element types of the logits, the scores and the weights.
        bias: Element type of the bias that the selection adds; empty if there is none.
        groups: Number of expert groups, 0 for none.
        two: A group is worth the sum of its best two.
        masked: Weights are the scores as the groups' mask leaves them.
        per_group: Experts that every group gives, 0 where they may come from anywhere.
        by_group: Those come group after group.
        first: Of equal scores the first is taken; else as torch.topk takes them.
        fill: Selection score outside the kept groups.
        eps: Added to the sum that weights are divided by.
    """

    logit: str
    score: str
    out: str
    bias: str
    experts: int
    k: int
    scoring: str
    topk_first: bool
    groups: int
    top_groups: int
    two: bool
    fill: float
    renormalize: bool
    eps: float
    scale: float
    sorted: bool
    masked: bool
    per_group: int
    by_group: bool
    first: bool

    @property
    def choice(self) -> str:
        """Element type of what is selected by: torch's common type of scores and bias."""
        return self.score if self.bias in ("", self.score) else "f32"


R = TypeVar("R", bound=Router)


def read(op: Op, types: Collection[str], kind: type[R]) -> R:
    """The sizes, types and kind of a ``moe.route`` op.

    Args:
        op: The op.
        types: Element types that the backend has.
        kind: The class of the result.

    Raises:
        UnsupportedError: Something in it is not covered; the message ends "cannot run this op: ...".
    """
    if op.regions:
        raise UnsupportedError("the router is a region")
    get = op_def(op.name).attr
    logits, weights, ids = (v.type for v in (op.operands[0], *op.results))
    if not (isinstance(logits, TensorType) and isinstance(weights, TensorType) and isinstance(ids, TensorType)):
        raise UnsupportedError("an operand or a result is no tensor")
    if not logits.shape[1].is_Integer:
        raise UnsupportedError(f"the number of experts is not fixed: {logits.shape[1]}")
    if ids.dtype.name != "i64":
        raise UnsupportedError(f"ids of type {ids.dtype}")
    first = get(op, "order") == "topk_first"
    # A router that takes the top k of the logits looks at neither bias nor groups.
    bias = "" if first or not op.group("bias") else _name(op.group("bias")[0].type)
    score = get(op, "score_dtype").name
    for name in (logits.dtype.name, score, weights.dtype.name, bias or score):
        if name not in types:
            raise UnsupportedError(f"elements of type {name}; supported are {', '.join(types)}")
    return kind(
        logit=logits.dtype.name,
        score=score,
        out=weights.dtype.name,
        bias=bias,
        experts=int(logits.shape[1]),
        k=get(op, "k"),
        scoring=get(op, "scoring"),
        topk_first=first,
        groups=0 if first else get(op, "groups"),
        top_groups=get(op, "top_groups"),
        two=get(op, "group_score") == "top2_sum",
        fill=get(op, "group_fill"),
        renormalize=get(op, "renormalize"),
        eps=get(op, "renorm_eps"),
        scale=get(op, "scale"),
        sorted=get(op, "sorted"),
        masked=get(op, "masked_weights"),
        per_group=0 if first else get(op, "per_group"),
        by_group=get(op, "by_group"),
        first=get(op, "ties") == "first",
    )


def _name(type: object) -> str:
    assert isinstance(type, TensorType)
    return type.dtype.name
