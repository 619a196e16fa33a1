"""What the kernels of one ``moe.experts`` op are generated for: everything but tensors, strides and tile sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.backends.calls import UnsupportedError
from moec.backends.triton.kernels.dtypes import TL_TYPES
from moec.backends.triton.kernels.expression import Elementwise, compile_elementwise
from moec.backends.triton.kernels.rows import RowFunction, compile_rows
from moec.ir.core import Op, Value
from moec.ir.opdef import op_def
from moec.ir.types import TensorType

ALIGNED = 16
"""Bytes of addresses, and multiples of strides, that kernels may count on: a thread loads so many at once at most."""


@dataclass(frozen=True)
class Spec:
    """Sizes, types and the activation of a layer.

    Attributes:
        experts, top_k: E and k.
        hidden: H, the width of a token's row.
        up: M, the outputs of the up GEMM that become one value each of gate (and of up).
        inner: I, the width of the activation's result.
        out: N, the width of the down GEMM's output.
        dtype: Element type of rows, weights and biases.
        weight_dtype, out_dtype: Element types of the router weights and of the result.
        layout: Where gate and up lie: ``concat``, ``interleaved``, ``separate``, ``single`` or ``rows``.
        up_nk, down_nk: A weight's rows are outputs; else inputs.
        stacked: One tensor holds all experts, or the only one; else the kernels take a table of addresses.
        up_bias, down_bias: There are biases.
        activation: The function between the GEMMs.
        post: The function of a row after the down GEMM.
        fp8: Both GEMMs multiply f8e4m3fn with f32 scales: weights have one for 128 x 128 elements, rows are brought to
            one for 1 x 128 as they come (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). Stacked weights alone.
        aligned: Every weight behind a table of addresses begins at a multiple of ``ALIGNED`` bytes.
    """

    experts: int
    top_k: int
    hidden: int
    up: int
    inner: int
    out: int
    dtype: str
    weight_dtype: str
    out_dtype: str
    layout: str
    up_nk: bool
    down_nk: bool
    stacked: bool
    up_bias: bool
    down_bias: bool
    activation: Elementwise | RowFunction
    post: RowFunction | None = None
    fp8: bool = False
    aligned: bool = True

    @property
    def element(self) -> str:
        """Element type that the GEMMs multiply."""
        return "f8e4m3fn" if self.fp8 else self.dtype

    @property
    def gated(self) -> bool:
        """The activation takes gate and up."""
        return self.layout in ("concat", "interleaved", "separate")

    @property
    def width(self) -> int:
        """Columns of the layer's result."""
        return self.out if self.post is None else self.post.width

    @property
    def row_dtype(self) -> str:
        """Element type of a row that is weighted."""
        return self.dtype if self.post is None else self.post.dtype

    @property
    def product(self) -> str:
        """Element type of a weighted row: torch's common type."""
        return self.row_dtype if self.row_dtype == self.weight_dtype else "f32"

    def lying(self, up_nk: bool, down_nk: bool, aligned: bool = True) -> Spec:
        """The same layer with weights that lie so in memory."""
        return replace(self, up_nk=up_nk, down_nk=down_nk, aligned=aligned)


def _tensor(value: Value) -> TensorType:
    if not isinstance(value.type, TensorType):
        raise UnsupportedError(f"{value!r} is no tensor")
    return value.type


def _sizes(op: Op, name: str, index: int) -> tuple[int, int]:
    """Outputs and inputs of a weight."""
    *_, rows, columns = (int(d) for d in _tensor(op.group(name)[index]).shape)
    return (rows, columns) if op_def(op.name).attr(op, f"{name}_form") == "nk" else (columns, rows)


def read_spec(op: Op) -> Spec:
    """The sizes and types of a ``moe.experts`` op.

    Raises:
        UnsupportedError: Something in it is not covered; the message ends "cannot run this op: ...".
    """
    get = op_def(op.name).attr
    x, ids, weights = (_tensor(v) for v in op.operands[:3])
    result, layout, dtype = _tensor(op.result), get(op, "layout"), x.dtype.name
    for type in (x, weights, result):
        if type.dtype.name not in TL_TYPES:
            raise UnsupportedError(f"elements of type {type.dtype}; supported are {', '.join(TL_TYPES)}")
    fp8 = bool(op.group("up_scale"))
    for value in (*op.group("up"), *op.group("down"), *op.group("up_bias"), *op.group("down_bias")):
        scaled = fp8 and value in (*op.group("up"), *op.group("down"))
        if _tensor(value).dtype.name != dtype and not scaled:
            raise UnsupportedError(f"rows are {dtype} and {value!r} is {_tensor(value).dtype}")
        if not all(d.is_Integer for d in _tensor(value).shape):
            raise UnsupportedError(f"{value!r} has a size that is not fixed: {list(_tensor(value).shape)}")
    if not ids.shape[1].is_Integer:
        raise UnsupportedError(f"the number of experts per token is not fixed: {ids.shape[1]}")
    if len({v.type for v in op.group("down")}) > 1:
        raise UnsupportedError("experts differ in their widths")
    up, hidden = _sizes(op, "up", 0)
    out, inner = _sizes(op, "down", 0)
    activation: Elementwise | RowFunction
    if layout == "rows":
        activation = compile_rows(op.regions[0], "the activation")
        if (activation.takes, activation.width, activation.dtype) != (up, inner, dtype):
            raise UnsupportedError(f"the activation gives {activation.dtype} x {activation.width}")
    else:
        activation = compile_elementwise(op.regions[0], 1 if layout == "single" else 2, dtype)
    post = compile_rows(op.regions[1], "the function after the down GEMM") if len(op.regions) > 1 else None
    if post is not None and post.takes != out:
        raise UnsupportedError(f"the down GEMM gives {out} columns where {post.takes} are taken")
    return Spec(
        experts=get(op, "experts"),
        top_k=int(ids.shape[1]),
        hidden=hidden,
        up=up if layout == "rows" else inner,
        inner=inner,
        out=out,
        dtype=dtype,
        weight_dtype=weights.dtype.name,
        out_dtype=result.dtype.name,
        layout=layout,
        up_nk=get(op, "up_form") == "nk",
        down_nk=get(op, "down_form") == "nk",
        stacked=get(op, "stacked") or get(op, "experts") == 1,
        up_bias=bool(op.group("up_bias")),
        down_bias=bool(op.group("down_bias")),
        activation=activation,
        post=post,
        fp8=fp8,
    )
