"""What a graph computes beside its layers, and how long it takes.

Only what is the same on all ranks is read of a graph: the sizes of the model's own matrices and heads, and bytes of a
token. Numbers of tokens and lengths of sequences are those that all ranks plan with, so they all decide the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from moec.ir.core import Op, Value
from moec.ir.types import TensorType
from moec.passes.calls import call_args
from moec.passes.matching import ATTENTION_CORE, CASTS, FREE, VIEWS, arg, function, peel

WEIGHT_AT = {"linear": 1, "mm": 1, "matmul": 1, "addmm": 2}
"""Calls that read a matrix of the model, and which argument that is."""
_TURNED = (*VIEWS, *CASTS, "t", "transpose", "permute", "detach")


@runtime_checkable
class InterleaveCosts(Protocol):
    """What ``ctx.cost_model`` must answer besides what ``overlap`` asks, for it to be known whether it pays."""

    def dense_seconds(self, group: str, rows: float, inputs: float, outputs: float, dtype: str) -> float | None:
        """Time of ``rows x inputs`` times ``inputs x outputs`` on a rank of a group; None where it is not known."""

    def piece_seconds(self, group: str) -> float | None:
        """Time of a rank's processor that one op of a layer in pieces takes; None where nobody measured it."""


@runtime_checkable
class WorkCosts(Protocol):
    """What ``ctx.cost_model`` may answer besides; what it does not say counts as nothing."""

    def core_seconds(self, group: str, flops: float, bytes: float, dtype: str, backward: bool) -> float:
        """Time of attention between its projections, of which the forward has so many operations."""

    def moved_seconds(self, group: str, bytes: float) -> float:
        """Time of an op that reads and writes so many bytes together."""

    def op_seconds(self, op: Op, group: str, place: int, bytes: float) -> float:
        """Time of an op of a layer's forward (place 0) or backward (1) that is no expert and sends nothing."""


@dataclass(frozen=True)
class Dense:
    """Tokens times a matrix of the model: its sides, and the type of the tokens."""

    inputs: float
    outputs: float
    dtype: str


@dataclass(frozen=True)
class Core:
    """Attention between its projections.

    Attributes:
        width: Elements of a token's queries and of its result, all heads together.
        kept: Elements of a token's key and value.
        length: Tokens of a sequence.
        causal: A token sees none that comes later.
        dtype: Of the queries.
        item: Bytes of an element.
    """

    width: float
    kept: float
    length: int
    causal: bool
    dtype: str
    item: float


@dataclass(frozen=True)
class Moved:
    """An op that takes its bytes: of each token, and those that do not depend on tokens."""

    token: float = 0.0
    fixed: float = 0.0


Work = Dense | Core | Moved


def work_seconds(work: Work, group: str, tokens: float, costs: InterleaveCosts, backward: bool) -> float | None:
    """Time of it on a rank of a group; None where the cost model does not know it."""
    if isinstance(work, Dense):
        return costs.dense_seconds(group, tokens, work.inputs, work.outputs, work.dtype)
    if not isinstance(costs, WorkCosts):
        return None
    if isinstance(work, Moved):
        return costs.moved_seconds(group, tokens * work.token + work.fixed)
    flops = tokens * work.length * work.width * (1 if work.causal else 2)  # two for a multiply-add
    return costs.core_seconds(group, flops, tokens * (work.width + work.kept) * work.item, work.dtype, backward)


def work_of(op: Op, tokens: Any, length: int) -> Work | None:
    """What an op of a whole program does beside layers; None where it takes no time or sizes are not known.

    Args:
        op: Of the program's top.
        tokens: The size that stands for a rank's tokens there.
        length: Tokens of a sequence, where the program has none; 0 where nobody knows.
    """
    if function(op) in WEIGHT_AT and (found := _dense(op)) is not None:
        return found
    if function(op) == ATTENTION_CORE:
        return _core(op, length)
    if op.name not in ("torch.call", "moe.route") or function(op) in FREE:
        return None
    types = [v.type for v in (*op.operands, *op.results)]
    moved = [_token_bytes(t, tokens) for t in types if isinstance(t, TensorType)]
    return Moved(token=sum(moved)) if any(moved) else None


def _token_bytes(type: TensorType, tokens: Any) -> float:
    if not type.shape or type.shape[0] != tokens or not all(d.is_Integer for d in type.shape[1:]):
        return 0.0
    bytes = type.dtype.bits / 8
    for d in type.shape[1:]:
        bytes *= int(d)
    return bytes


def _dense(op: Op) -> Dense | None:
    """A product with a matrix that the program is given, which no number of tokens is a size of."""
    weight = peel(arg(op, WEIGHT_AT[function(op)], "weight"), _TURNED)
    result = op.result.type
    if not isinstance(weight, Value) or weight.op is not None or not isinstance(result, TensorType):
        return None
    shape = weight.type.shape if isinstance(weight.type, TensorType) else ()
    named = "target" in weight.meta or any(not d.is_Integer for d in result.shape)
    if not named or len(shape) != 2 or not all(d.is_Integer for d in shape) or not result.shape[-1].is_Integer:
        return None
    outputs = float(int(result.shape[-1]))
    return Dense(float(int(shape[0]) * int(shape[1])) / outputs, outputs, result.dtype.name)


def _core(op: Op, length: int) -> Core | None:
    args, kwargs = call_args(op)
    types = [v.type for v in args[:3] if isinstance(v, Value) and isinstance(v.type, TensorType)]
    if len(types) < 3 or any(t.rank != 4 for t in types):
        return None
    query, key, value = (t.shape for t in types)
    fixed = (query[1], query[3], key[1], value[3])
    length = int(key[2]) if key[2].is_Integer else length
    if not length or not all(d.is_Integer for d in fixed):
        return None
    heads, wide, kept, narrow = map(int, fixed)
    causal = bool(kwargs.get("is_causal", args[5] if len(args) > 5 else False))
    both = wide + narrow
    return Core(heads * both, kept * both, length, causal, types[0].dtype.name, types[0].dtype.bits / 8)
