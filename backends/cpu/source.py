"""The C++ source of one layer: its sizes, types and activation around the templates of ``include/``."""

from __future__ import annotations

from dataclasses import dataclass

from moec.backends.calls import UnsupportedError
from moec.backends.cpu.cpp import C_TYPES, boolean
from moec.backends.cpu.expression import compile_activation
from moec.backends.cpu.row_function import RowFunction, compile_rows
from moec.backends.cpu.row_program import padded
from moec.ir.core import Op, Value
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
    static constexpr bool RAGGED = {ragged}, LANEWISE = {lanewise};
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
        inners: Width of the activation of every expert.
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
    inners: tuple[int, ...]
    down: int
    parts: int
    layout: str
    up_bias: bool
    down_bias: bool
    activation: str | RowFunction
    post: RowFunction | None

    @property
    def inner(self) -> int:
        """I, the width of the activation: the widest."""
        return max(self.inners)

    @property
    def ragged(self) -> bool:
        """Experts differ in their widths."""
        return len(set(self.inners)) > 1

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


def _tensor(value: Value) -> TensorType:
    assert isinstance(value.type, TensorType)
    return value.type


def _sizes(op: Op, name: str, index: int) -> tuple[int, int]:
    """Outputs and inputs of a weight."""
    *_, rows, columns = (int(d) for d in _tensor(op.group(name)[index]).shape)
    return (rows, columns) if op_def(op.name).attr(op, f"{name}_form") == "nk" else (columns, rows)


def _activation(op: Op, layout: str, parts: int, element: str, inner: int) -> str | RowFunction:
    if layout != "rows":
        return compile_activation(op.regions[0], parts, element).body
    made = compile_rows(op.regions[0], "the activation")
    given, outputs = f"{made.dtype} x {made.width}", _sizes(op, "up", 0)[0]
    if given != f"{element} x {inner}":
        raise UnsupportedError(f"the activation gives {given}, the down GEMM takes {element} x {inner}")
    if outputs != made.takes:
        raise UnsupportedError(f"the up GEMM gives {outputs} columns where {made.takes} are taken")
    return made


def read_shape(op: Op) -> Shape:
    """The sizes and types of a ``moe.experts`` op.

    Raises:
        UnsupportedError: Something in it is not covered; the message ends "cannot run this op: ...".
    """
    get = op_def(op.name).attr
    layout = get(op, "layout")
    x, weights = _tensor(op.operands[0]), _tensor(op.operands[2])
    element = x.dtype.name
    result = op.result.type
    assert isinstance(result, TensorType)
    if op.group("up_scale"):
        raise UnsupportedError("its weights are fp8 with scales; aten multiplies what they stand for")
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
    _, hidden = _sizes(op, "up", 0)
    downs = [_sizes(op, "down", i) for i in range(len(op.group("down")))]
    width, inners = downs[0][0], tuple(inner for _, inner in downs)
    parts = 2 if layout in ("concat", "interleaved", "separate") else 1
    if len(set(inners)) > 1 and any(_tensor(v).shape not in ((), (1,)) for v in op.group("captures")):
        raise UnsupportedError("experts differ in their widths and the activation has a captured tensor of a width")
    activation = _activation(op, layout, parts, element, inners[0])
    post = compile_rows(op.regions[1], "the function after the down GEMM") if len(op.regions) > 1 else None
    if post is not None and post.takes != width:
        raise UnsupportedError(f"the down GEMM gives {width} columns where {post.takes} are taken")
    return Shape(
        element=element,
        weight=weights.dtype.name,
        out=result.dtype.name,
        experts=get(op, "experts"),
        hidden=hidden,
        inners=inners if len(inners) > 1 else inners * get(op, "experts"),
        down=width,
        parts=parts,
        layout=layout,
        up_bias=bool(op.group("up_bias")),
        down_bias=bool(op.group("down_bias")),
        activation=activation,
        post=post,
    )


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
        up_nk=boolean(up_nk),
        down_nk=boolean(down_nk),
        paired=boolean(shape.layout == "interleaved"),
        up_bias=boolean(shape.up_bias),
        down_bias=boolean(shape.down_bias),
        rows=boolean(not isinstance(shape.activation, str)),
        post=boolean(shape.post is not None),
        ragged=boolean(shape.ragged),
        lanewise=boolean(isinstance(shape.activation, str) and "captures[" not in shape.activation),
        row_floats=row_floats,
        functions=functions,
    )
