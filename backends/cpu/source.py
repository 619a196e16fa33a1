"""The C++ source of one layer: its sizes, types and activation around the templates of ``include/``."""

from __future__ import annotations

from dataclasses import dataclass

from moec.backends.cpu.expression import C_TYPES, UnsupportedError, compile_activation
from moec.backends.cpu.row_ops import RowFunction, compile_rows
from moec.backends.cpu.row_program import padded
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.types import TensorType

_TEMPLATE = """\
#include "experts.h"

using namespace moec;

namespace {{
struct Sizes {{
    using T = {element};
    using Weight = {weight};
    using Product = {product};
    using Out = {out};
    using Row = {row};
    static constexpr int E = {experts}, PARTS = {parts};
    static constexpr int K = {hidden}, M = {up}, I = {inner}, N = {down}, WIDTH = {width};
    static constexpr bool UP_NK = {up_nk}, DOWN_NK = {down_nk}, PAIRED = {paired};
    static constexpr bool UP_BIAS = {up_bias}, DOWN_BIAS = {down_bias}, ROWS = {rows}, POST = {post};
    static constexpr int64_t ROW_FLOATS = {row_floats};
{functions}}};
}}

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void moec_experts(const Call* call) {{ experts<Sizes>(*call); }}
EXPORT int64_t moec_a_row() {{ return Layer<Sizes>::A_ROW; }}
EXPORT int64_t moec_o_row() {{ return Layer<Sizes>::O_ROW; }}
EXPORT int64_t moec_room(int64_t rows) {{ return Layer<Sizes>::room_bytes(rows); }}
"""

_ELEMENTWISE = """\
    static inline V activation(V g, V u, const void* const* captures, int i, int n) {{
        {body}
    }}
"""
_OF_ROWS = """\
    template <class Put>
    static inline void {name}(const float* h, const void* const* captures, float* room, Put&& put) {{
        {body}
    }}
"""


@dataclass(frozen=True)
class Shape:
    """What the kernel is generated for; everything but strides and pointers.

    Attributes:
        element, weight, out: Element types of the rows, the router weights and the result.
        inner: I, the width of the activation.
        down: N, the width of the down GEMM's output.
        parts: 2 for gate and up, 1 for one projection.
        activation: The statements of an elementwise activation, or the function of a row.
        post: The function of a row after the down GEMM.
    """

    element: str
    weight: str
    out: str
    experts: int
    hidden: int
    inner: int
    down: int
    parts: int
    layout: str
    up_bias: bool
    down_bias: bool
    activation: str | RowFunction
    post: RowFunction | None

    @property
    def up(self) -> int:
        """M, the outputs of the up GEMM in each part."""
        return self.inner if isinstance(self.activation, str) else self.activation.takes

    @property
    def width(self) -> int:
        """Columns of the layer's result."""
        return self.down if self.post is None else self.post.width

    @property
    def row(self) -> str:
        """Element type of a row that is weighted."""
        return self.element if self.post is None else self.post.dtype


def _float(op: Op, index: int) -> TensorType:
    type = op.operands[index].type
    assert isinstance(type, TensorType)
    return type


def read_shape(op: Op) -> Shape:
    """The sizes and types of a ``moe.experts`` op.

    Raises:
        UnsupportedError: Something in it is not covered; the message ends "cannot run this op: ...".
    """
    get = op_def(op.name).attr
    layout = get(op, "layout")
    x, weights = _float(op, 0), _float(op, 2)
    element = x.dtype.name
    result = op.result.type
    assert isinstance(result, TensorType)
    matrices = (*op.group("up"), *op.group("down"), *op.group("up_bias"), *op.group("down_bias"))
    for value in (*op.operands, *op.results):
        if not isinstance(value.type, TensorType):
            raise UnsupportedError(f"{value!r} is no tensor")
        if value.type.device != "cpu":
            raise UnsupportedError(f"{value!r} is on {value.type.device}")
    for name in (element, weights.dtype.name, result.dtype.name):
        if name not in C_TYPES:
            raise UnsupportedError(f"elements of type {name}; supported are {', '.join(C_TYPES)}")
    for value in matrices:
        assert isinstance(value.type, TensorType)
        if value.type.dtype.name != element:
            raise UnsupportedError(f"rows are {element} and {value!r} is {value.type.dtype}")
        if not all(d.is_Integer for d in value.type.shape):
            raise UnsupportedError(f"{value!r} has a size that is not fixed: {list(value.type.shape)}")
    up, down = op.group("up")[0].type, op.group("down")[0].type
    assert isinstance(up, TensorType)
    assert isinstance(down, TensorType)
    (n, k) = up.shape[-2:] if get(op, "up_form") == "nk" else up.shape[:-3:-1]
    (width, inner) = down.shape[-2:] if get(op, "down_form") == "nk" else down.shape[:-3:-1]
    parts = 2 if layout in ("concat", "interleaved", "separate") else 1
    activation: str | RowFunction
    if layout == "rows":
        activation = compile_rows(op.regions[0], "the activation")
        wanted, given = activation.takes, f"{activation.dtype} x {activation.width}"
        if given != f"{element} x {inner}":
            raise UnsupportedError(f"the activation gives {given}, the down GEMM takes {element} x {inner}")
    else:
        activation = compile_activation(op.regions[0], parts, element).body
        wanted = int(inner) * (2 if layout in ("concat", "interleaved") else 1)
    if int(n) != wanted:
        raise UnsupportedError(f"the up GEMM gives {n} columns where {wanted} are taken")
    post = compile_rows(op.regions[1], "the function after the down GEMM") if len(op.regions) > 1 else None
    if post is not None and post.takes != int(width):
        raise UnsupportedError(f"the down GEMM gives {width} columns where {post.takes} are taken")
    return Shape(
        element=element,
        weight=weights.dtype.name,
        out=result.dtype.name,
        experts=get(op, "experts"),
        hidden=int(k),
        inner=int(inner),
        down=int(width),
        parts=parts,
        layout=layout,
        up_bias=bool(op.group("up_bias")),
        down_bias=bool(op.group("down_bias")),
        activation=activation,
        post=post,
    )


def _bool(value: bool) -> str:
    return "true" if value else "false"


def write_source(shape: Shape, up_nk: bool, down_nk: bool) -> str:
    """The source for weights whose rows are outputs (``nk``) or inputs (``kn``), as they lie in memory."""
    wide = shape.weight if shape.weight == shape.row else "f32"
    functions, row_floats = "", 0
    for name, function in (("activation_row", shape.activation), ("post_row", shape.post)):
        if isinstance(function, str):
            functions += _ELEMENTWISE.format(body=function)
        elif function is not None:
            functions += _OF_ROWS.format(name=name, body=function.body)
            row_floats = max(row_floats, padded(function.takes) + function.floats)
    return _TEMPLATE.format(
        element=C_TYPES[shape.element],
        weight=C_TYPES[shape.weight],
        product=C_TYPES[wide],
        out=C_TYPES[shape.out],
        experts=shape.experts,
        hidden=shape.hidden,
        row=C_TYPES[shape.row],
        up=shape.up,
        inner=shape.inner,
        down=shape.down,
        width=shape.width,
        parts=shape.parts,
        up_nk=_bool(up_nk),
        down_nk=_bool(down_nk),
        paired=_bool(shape.layout == "interleaved"),
        up_bias=_bool(shape.up_bias),
        down_bias=_bool(shape.down_bias),
        rows=_bool(not isinstance(shape.activation, str)),
        post=_bool(shape.post is not None),
        row_floats=row_floats,
        functions=functions,
    )
