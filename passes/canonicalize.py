"""``canonicalize``: one way to write things, so that other passes need to know only that one.

Every rewrite here leaves each value with the memory it had: what is dropped handed its operand on as it was (same
elements, same strides). So they are safe even where something writes to that memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.ir.attributes import ListAttr, Literal
from moec.ir.core import Graph, Op, Value
from moec.ir.types import DType, TensorType
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.calls import bound_args, call_args, is_call
from moec.passes.registry import register_pass
from moec.passes.rewrite import Rewrite, Rewriter, apply_rewrites

_TO = ("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten.type_as.default")
_CASTS = (*_TO, "aten._to_copy.default")
_RESHAPES = (
    "aten.view.default",
    "aten.reshape.default",
    "aten.expand.default",
    "aten.view_as.default",
    "aten.reshape_as.default",
    "aten.expand_as.default",
    "aten.broadcast_to.default",
    "aten.flatten.using_ints",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
)
_TRANSPOSES = ("aten.transpose.int", "aten.t.default", "aten.permute.default", "aten.numpy_T.default")


def _tensors(op: Op) -> tuple[TensorType, TensorType] | None:
    """The types of the first operand and of the only result, if both are tensors."""
    if not op.operands or len(op.results) != 1:
        return None
    a, b = op.operands[0].type, op.result.type
    return (a, b) if isinstance(a, TensorType) and isinstance(b, TensorType) else None


class _HandOn(Rewrite[Op]):
    """Base: the op's result is its first operand."""

    def rewrite(self, match: Op, rewriter: Rewriter) -> None:
        rewriter.replace(match, [match.operands[0]])


class DropAlias(_HandOn):
    """``alias(x)`` is ``x``: the same memory, seen the same way. (``detach`` is not: it cuts the gradient.)"""

    name = "drop-alias"

    def pattern(self, op: Op) -> Op | None:
        return op if is_call(op, "aten.alias.default") else None


class DropDropout(_HandOn):
    """``dropout`` outside of training is its input, handed on as it is."""

    name = "drop-dropout"

    def pattern(self, op: Op) -> Op | None:
        return op if is_call(op, "aten.dropout.default") and bound_args(op).get("train") is False else None


class DropMetadataAssert(Rewrite[Op]):
    """``_assert_tensor_metadata`` of what the operand's type already says can never fire."""

    name = "drop-metadata-assert"

    def pattern(self, op: Op) -> Op | None:
        return op if is_call(op, "aten._assert_tensor_metadata.default") else None

    def check(self, match: Op) -> str | None:
        claims, t = bound_args(match), match.operands[0].type
        if not isinstance(t, TensorType):
            return "its operand is no tensor"
        if any(r.uses for r in match.results):
            return "its result is used"
        if claims.get("stride") is not None:
            return "it asserts strides, which types do not tell"
        if claims.get("size") is not None:
            return "it asserts sizes, which may be numbers of this run only"
        if claims.get("layout") not in (None, Literal("layout", "strided")):
            return "it asserts a layout that is not strided"
        if claims.get("dtype") not in (None, t.dtype):
            return f"it asserts {claims['dtype']}, the operand is {t.dtype}"
        device = claims.get("device")
        if device is not None and device != Literal("device", t.device):
            return f"it asserts the device {device.text}, the operand is on {t.device}"
        return None

    def rewrite(self, match: Op, rewriter: Rewriter) -> None:
        rewriter.erase(match)


class OneCastForm(Rewrite[Op]):
    """Every cast that changes nothing but the element type is written ``to.dtype(x, dtype)``.

    Safe because on one device, with strides kept and no copy asked for, ``to.dtype_layout``, ``to.device``,
    ``to.other`` and ``type_as`` do just that; ``_to_copy`` does it where the type really changes.
    """

    name = "one-cast-form"

    def pattern(self, op: Op) -> Op | None:
        if not is_call(op, *_CASTS):
            return None
        types = _tensors(op)
        if types is None or (is_call(op, "aten.to.dtype") and _is_plain_cast(op)):
            return None
        return op

    def check(self, match: Op) -> str | None:
        source, result = _tensors_of(match)
        given = bound_args(match)
        if source.device != result.device:
            return f"it moves the tensor from {source.device} to {result.device}"
        if given.get("copy"):
            return "it asks for a copy"
        if given.get("memory_format") not in (None, Literal("memory_format", "preserve_format")):
            return f"it asks for the memory format {_name(given['memory_format'])}"
        if given.get("layout") not in (None, Literal("layout", "strided")):
            return f"it asks for the layout {_name(given['layout'])}"
        if given.get("pin_memory"):
            return "it asks for pinned memory"
        if is_call(match, "aten._to_copy.default") and source.dtype == result.dtype:
            return "it makes a copy of the same type"
        return None

    def rewrite(self, match: Op, rewriter: Rewriter) -> None:
        source, result = _tensors_of(match)
        types = [source.with_(dtype=result.dtype)]
        made = rewriter.call("aten.to.dtype", (match.operands[0], result.dtype), result_types=types)
        rewriter.replace(match, [made.result])


def _is_plain_cast(op: Op) -> bool:
    args = call_args(op)[0]
    return not op.attrs.get("kwargs") and len(args) == 2 and isinstance(args[1], DType)


def _name(value: Any) -> str:
    return value.text if isinstance(value, Literal) else str(value)


def _tensors_of(op: Op) -> tuple[TensorType, TensorType]:
    types = _tensors(op)
    assert types is not None  # the pattern saw to it
    return types


class DropCast(_HandOn):
    """``to.dtype(x, dtype of x)`` hands ``x`` on: ``to`` copies only where something changes."""

    name = "drop-cast"

    def pattern(self, op: Op) -> Op | None:
        if not is_call(op, "aten.to.dtype") or not _is_plain_cast(op):
            return None
        types = _tensors(op)
        return op if types is not None and types[0] == types[1] else None


class UnsafeView(Rewrite[Op]):
    """``_unsafe_view`` is ``view``: the name only told an older autograd not to track the sharing."""

    name = "unsafe-view"

    def pattern(self, op: Op) -> Op | None:
        return op if is_call(op, "aten._unsafe_view.default") and _tensors(op) is not None else None

    def rewrite(self, match: Op, rewriter: Rewriter) -> None:
        args, _ = call_args(match)
        made = rewriter.call("aten.view.default", args, result_types=[match.result.type])
        rewriter.replace(match, [made.result])


class DropReshape(_HandOn):
    """A view, reshape, expand, flatten or squeeze to the shape that is already there hands the tensor on.

    None of them reorders elements, and with an unchanged shape each gives a view with unchanged strides; ``reshape``
    too, which copies only where a view cannot do it.
    """

    name = "drop-reshape"

    def pattern(self, op: Op) -> Op | None:
        if not is_call(op, *_RESHAPES):
            return None
        types = _tensors(op)
        return op if types is not None and types[0] == types[1] else None


class DropFullSlice(_HandOn):
    """A slice with step 1 that is as long as what it is cut from is all of it."""

    name = "drop-full-slice"

    def pattern(self, op: Op) -> Op | None:
        if not is_call(op, "aten.slice.Tensor") or bound_args(op).get("step") != 1:
            return None
        types = _tensors(op)
        return op if types is not None and types[0] == types[1] else None


class DoubleTranspose(Rewrite[tuple[Op, Value]]):
    """A transpose of a transpose that restores the order of dimensions is the tensor itself: both are pure views."""

    name = "double-transpose"

    def pattern(self, op: Op) -> tuple[Op, Value] | None:
        outer = _permutation(op)
        if outer is None:
            return None
        if outer == list(range(len(outer))):
            return op, op.operands[0]
        inner_op = op.operands[0].op
        inner = _permutation(inner_op) if inner_op is not None else None
        if inner is None or inner_op is None or [inner[d] for d in outer] != list(range(len(outer))):
            return None
        return op, inner_op.operands[0]

    def rewrite(self, match: tuple[Op, Value], rewriter: Rewriter) -> None:
        op, source = match
        inner = op.operands[0].op
        rewriter.replace(op, [source])
        if inner is not None and is_call(inner, *_TRANSPOSES):
            rewriter.erase_unused(inner)


class SqueezedUnsqueeze(Rewrite[tuple[Op, Value]]):
    """A squeeze of exactly the dimension that an unsqueeze added is the tensor itself: both are pure views."""

    name = "squeezed-unsqueeze"

    def pattern(self, op: Op) -> tuple[Op, Value] | None:
        inner = op.operands[0].op if is_call(op, "aten.squeeze.dim", "aten.squeeze.dims") else None
        if inner is None or not is_call(inner, "aten.unsqueeze.default"):
            return None
        source, between = _tensors(inner) or (None, None)
        if source is None or between is None or source != op.result.type:
            return None
        taken, added = bound_args(op)["dim"], bound_args(inner)["dim"]
        dims = taken.items if isinstance(taken, ListAttr) else (taken,)
        same = len(dims) == 1 and isinstance(dims[0], int) and dims[0] % between.rank == added % between.rank
        return (op, inner.operands[0]) if same else None

    def rewrite(self, match: tuple[Op, Value], rewriter: Rewriter) -> None:
        op, source = match
        inner = op.operands[0].op
        rewriter.replace(op, [source])
        if inner is not None and is_call(inner, "aten.unsqueeze.default"):
            rewriter.erase_unused(inner)


def _permutation(op: Op) -> list[int] | None:
    """Which dimension of the operand each dimension of the result is, for calls that only permute dimensions."""
    types = _tensors(op) if is_call(op, *_TRANSPOSES) else None
    if types is None:
        return None
    rank = types[0].rank
    order = list(range(rank))
    given = bound_args(op)
    if op.attrs["target"] == "aten.permute.default":
        dims = given["dims"]
        listed = dims.items if isinstance(dims, ListAttr) else dims
        return [d % rank for d in listed] if rank and all(isinstance(d, int) for d in listed) else None
    if op.attrs["target"] == "aten.transpose.int":
        a, b = given["dim0"], given["dim1"]
        if not rank or not (isinstance(a, int) and isinstance(b, int)):
            return None
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
        return order
    return order[::-1]


REWRITES: tuple[Rewrite[Any], ...] = (
    DropAlias(),
    DropDropout(),
    DropMetadataAssert(),
    OneCastForm(),
    DropCast(),
    UnsafeView(),
    DropReshape(),
    DropFullSlice(),
    DoubleTranspose(),
    SqueezedUnsqueeze(),
)


@register_pass
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Brings casts, views, slices and transposes into one form and drops those that do nothing.

    Casts within one device become ``to.dtype``; casts to the type that is there, views to the shape that is there,
    full slices, ``alias``, pairs of transposes, squeezes of what was unsqueezed and asserts of what types already say
    disappear. ``detach``, ``clone``, ``contiguous`` and casts that ask for a copy stay.
    """

    name = "canonicalize"
    pass_class = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        return apply_rewrites(graph, REWRITES, ctx, self.name)
