"""Functions of whole rows as Triton: a row is one tensor in registers, reductions are over its live columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.backends.calls import UnsupportedError
from moec.backends.triton.kernels.dtypes import TL_TYPES, number, rounded
from moec.backends.triton.kernels.expression import expression
from moec.ir.core import Graph, Op, Value
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import TensorType
from moec.passes.matching import arg, function, last_dim

WIDEST = 16384
"""Columns of a row that a program holds."""


@dataclass(frozen=True)
class RowFunction:
    """A region as the statements of a program that has one row.

    Attributes:
        lines: They read the row at ``at`` and the captures at ``c0_at``, ``c1_at``, ...
        result: The name of the result, ``columns(width)`` wide.
        takes: Columns of the row it is given.
        width, dtype: Of the result.
        captures: Element type of every captured tensor, and whether it has a value for each column (else one alone).
    """

    lines: tuple[str, ...]
    result: str
    takes: int
    width: int
    dtype: str
    captures: tuple[tuple[str, bool], ...]


def padded(width: int) -> int:
    """Elements of the tensor that holds a row: a power of two."""
    return 1 << max(0, width - 1).bit_length()


@dataclass(eq=False)
class _Node:
    """A value: its name, its columns (None for one number a row), and whether it depends on the row.

    ``start`` and ``step`` say which columns of the given row it is; None where it is computed.
    """

    name: str
    width: int | None
    moving: bool
    start: int | None = None
    step: int = 1


def _typed(where: str, value: Value, what: str) -> TensorType:
    type = value.type
    if not isinstance(type, TensorType) or type.dtype.name not in TL_TYPES:
        raise UnsupportedError(f"{where} has {what} of type {getattr(type, 'dtype', type)}")
    return type


def _columns(where: str, value: Value, what: str) -> int:
    shape = _typed(where, value, what).shape
    if not (shape and shape[-1].is_Integer):
        raise UnsupportedError(f"{where} has {what} of shape {list(shape)}")
    if not 2 <= int(shape[-1]) <= WIDEST:
        raise UnsupportedError(f"{where} has {what} of {shape[-1]} columns")
    return int(shape[-1])


@dataclass
class _Reader:
    """A region half read: its values and statements so far."""

    where: str
    rows: Any  # the first dimension of everything that holds rows
    nodes: dict[Value, _Node] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def put(self, text: str, width: int | None, moving: bool, dtype: str = "f32") -> _Node:
        """A new value."""
        node = _Node(f"v{len(self.lines)}", width, moving)
        self.lines.append(f"{node.name} = {rounded(text, dtype)}")
        return node

    def load(self, start: int, width: int, step: int = 1) -> _Node:
        """Columns of the given row."""
        i = f"tl.arange(0, {padded(width)})"
        node = self.put(
            f"tl.load(at + {start} + {step} * {i}, mask={i} < {width}, other=0.0).to(tl.float32)", width, True
        )
        node.start, node.step = start, step
        return node

    def reduce(self, node: _Node, kind: str) -> _Node:
        """``sum``, ``max`` or ``min`` over a row."""
        assert node.width is not None
        neutral = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}[kind]
        text = node.name
        if padded(node.width) != node.width:
            text = f"tl.where(tl.arange(0, {padded(node.width)}) < {node.width}, {text}, {neutral})"
        return self.put(f"tl.{kind}({text}, 0)", None, True)

    def mean(self, node: _Node) -> _Node:
        return self.put(f"{self.reduce(node, 'sum').name} / {number(node.width or 1)}", None, True)

    def capture(self, index: int, value: Value) -> tuple[str, bool]:
        type = _typed(self.where, value, "a captured tensor")
        if type.shape in ((), (1,)):
            self.nodes[value] = self.put(f"tl.load(c{index}_at).to(tl.float32)", None, False)
            return type.dtype.name, False
        if type.rank != 1 and not (type.rank == 2 and type.shape[0] == 1):
            raise UnsupportedError(f"{self.where} has a captured tensor of shape {list(type.shape)}")
        width = _columns(self.where, value, "a captured tensor")
        i = f"tl.arange(0, {padded(width)})"
        text = f"tl.load(c{index}_at + {i}, mask={i} < {width}, other=0.0).to(tl.float32)"
        self.nodes[value] = self.put(text, width, False)
        return type.dtype.name, True

    def read(self, op: Op) -> None:
        if op.name != "torch.call" or op.regions:
            raise UnsupportedError(f"{self.where} holds {op.attrs.get('target', op.name)}")
        target = op.attrs["target"]
        types = [_typed(self.where, r, f"a result of {target}") for r in op.results]
        name = function(op) if target.startswith("aten.") else ""
        moving = [v for v in op.operands if self.nodes[v].moving]
        for t in types if moving else ():
            if t.rank not in (1, 2) or t.shape[0] != self.rows:
                raise UnsupportedError(f"{self.where} has a result of {target} of shape {list(t.shape)}")
        made = _STEPS[name](self, op) if name in _STEPS else [self.each(op, moving)]
        for result, node, t in zip(op.results, made, types, strict=True):
            have = t.shape[-1] if t.rank == 2 or not node.moving else 1
            if t.shape and have != (node.width or 1):
                raise UnsupportedError(f"{self.where} has a result of {target} of shape {list(t.shape)}")
            self.nodes[result] = node

    def each(self, op: Op, moving: list[Value]) -> _Node:
        type = _typed(self.where, op.result, "a result")
        names = {v: self.nodes[v].name for v in op.operands}
        ranks = {v.type.rank for v in moving if isinstance(v.type, TensorType)}
        widths = {n.width for v in op.operands if (n := self.nodes[v]).width is not None}
        if len(widths) > 1 or (moving and ranks != {type.rank}):
            raise UnsupportedError(f"{self.where} calls {op.attrs['target']} on rows of different shapes")
        text = expression(op, names, self.where)
        return self.put(text, next(iter(widths), None), bool(moving), type.dtype.name)

    def row(self, op: Op, dim: Any) -> _Node:
        """The operand of an op along the columns of a row."""
        node = self.nodes[op.operands[0]]
        if not last_dim(op.operands[0], dim) or not node.moving or node.width is None:
            raise UnsupportedError(f"{self.where} calls {op.attrs['target']} along another dimension than a row's")
        return node

    def result(self, op: Op, text: str, width: int | None) -> _Node:
        return self.put(text, width, True, _typed(self.where, op.results[0], "a result").dtype.name)

    def scaled(self, op: Op, node: _Node, weight: Any, bias: Any) -> _Node:
        """``node`` times a captured weight, plus a captured bias, where there are any."""
        text = node.name
        for symbol, value in (("*", weight), ("+", bias)):
            text = text if value is None else f"{text} {symbol} {self.nodes[value].name}"
        return self.result(op, text, node.width)


def _sum(r: _Reader, op: Op) -> list[_Node]:
    node = r.row(op, arg(op, 1, "dim"))
    made = r.mean(node) if function(op) == "mean" else r.reduce(node, "sum")
    return [r.result(op, made.name, None)]


def _extreme(r: _Reader, op: Op) -> list[_Node]:
    return [r.reduce(r.row(op, arg(op, 1, "dim")), function(op)[1:])]


def _square_sum(r: _Reader, node: _Node) -> _Node:
    return r.reduce(r.put(f"{node.name} * {node.name}", node.width, True), "sum")


def _centred(r: _Reader, node: _Node) -> _Node:
    return r.put(f"{node.name} - {r.mean(node).name}", node.width, True)


def _norm(r: _Reader, op: Op) -> list[_Node]:
    node = r.row(op, arg(op, 2, "dim"))
    if arg(op, 1, "ord", arg(op, 1, "p", 2)) != 2:
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} of another order than 2")
    return [r.result(op, f"tl.sqrt_rn({_square_sum(r, node).name})", None)]


def _var(r: _Reader, op: Op) -> list[_Node]:
    node = r.row(op, arg(op, 1, "dim"))
    correction = op.attrs.get("kwargs", {}).get("correction", 1)
    if not isinstance(correction, (int, float)) or op.attrs["target"] != "aten.var.correction":
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']}")
    count = number(max(0, (node.width or 1) - correction))
    return [r.result(op, f"{_square_sum(r, _centred(r, node)).name} / {count}", None)]


def _softmax(r: _Reader, op: Op) -> list[_Node]:
    node = r.row(op, arg(op, 1, "dim"))
    power = r.put(f"tl.exp({node.name} - {r.reduce(node, 'max').name})", node.width, True)
    return [r.result(op, f"{power.name} / {r.reduce(power, 'sum').name}", node.width)]


def _rms_norm(r: _Reader, op: Op) -> list[_Node]:
    node = _normalized(r, op)
    eps = arg(op, 3, "eps")
    type = _typed(r.where, op.operands[0], "rows")
    eps = torch.finfo(TO_TORCH[type.dtype.name]).eps if eps is None else eps
    return [r.scaled(op, _unit(r, node, eps), arg(op, 2, "weight"), None)]


def _layer_norm(r: _Reader, op: Op) -> list[_Node]:
    node = _unit(r, _centred(r, _normalized(r, op)), arg(op, 4, "eps", 1e-5))
    return [r.scaled(op, node, arg(op, 2, "weight"), arg(op, 3, "bias"))]


def _normalized(r: _Reader, op: Op) -> _Node:
    shape = arg(op, 1, "normalized_shape")
    return r.row(op, -1 if isinstance(shape, (list, tuple)) and len(shape) == 1 else None)


def _unit(r: _Reader, node: _Node, eps: float) -> _Node:
    """A row over the root of its mean square."""
    mean = f"{_square_sum(r, node).name} / {number(node.width or 1)}"
    return r.put(f"{node.name} / tl.sqrt_rn({mean} + {number(eps)})", node.width, True)


def _cut(r: _Reader, op: Op) -> list[_Node]:
    """``chunk``, ``split`` and ``split_with_sizes``: pieces one after another, as wide as the results' types say."""
    node, start = r.row(op, arg(op, 2, "dim", 0)), 0
    made: list[_Node] = []
    for result in op.results:
        made.append(_piece(r, op, node, start, 1, _columns(r.where, result, f"a result of {op.attrs['target']}")))
        start += made[-1].width or 0
    return made


def _slice(r: _Reader, op: Op) -> list[_Node]:
    node, start, step = r.row(op, arg(op, 1, "dim", 0)), arg(op, 2, "start", 0), arg(op, 4, "step", 1)
    start, step = 0 if start is None else start, 1 if function(op) == "narrow" else step
    assert node.width is not None
    if not isinstance(start, int) or not isinstance(step, int):
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} with bounds that are not fixed")
    start = max(0, min(start + node.width if start < 0 else start, node.width))
    return [_piece(r, op, node, start, step, _columns(r.where, op.result, f"a result of {op.attrs['target']}"))]


def _piece(r: _Reader, op: Op, node: _Node, start: int, step: int, width: int) -> _Node:
    if node.start is None:
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} on what it has computed")
    return r.load(node.start + start * node.step, width, node.step * step)


def _same(r: _Reader, op: Op) -> list[_Node]:
    """A dimension of size one more or less: columns stay columns."""
    node = r.nodes[op.operands[0]]
    if node.moving and node.width is not None:
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} on a whole row")
    return [node]


_STEPS: dict[str, Callable[[_Reader, Op], list[_Node]]] = {
    **dict.fromkeys(("sum", "mean"), _sum),
    **dict.fromkeys(("amax", "amin"), _extreme),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _norm),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _cut),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("unsqueeze", "squeeze"), _same),
    "var": _var,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
}


def compile_rows(region: Graph, where: str) -> RowFunction:
    """A region of whole rows as Triton.

    Args:
        region: Takes the rows ``[R, N]``, then its captures; gives rows ``[R, M]``.
        where: What it is, for messages ("the activation").

    Raises:
        UnsupportedError: It mixes rows, or an op in it is not known.
    """
    first, *captured = region.args
    takes = _columns(where, first, "rows")
    reader = _Reader(where, _typed(where, first, "rows").shape[0])
    reader.nodes[first] = reader.load(0, takes)
    captures: Sequence[tuple[str, bool]] = [reader.capture(i, c) for i, c in enumerate(captured)]
    for op in region.ops:
        if op is not region.terminator:
            reader.read(op)
    (result,) = region.terminator.operands
    node, type = reader.nodes[result], _typed(where, result, "a result")
    if node.width is None or not node.moving:
        raise UnsupportedError(f"{where} gives {type.dtype}{list(type.shape)}, which are no rows")
    return RowFunction(tuple(reader.lines), node.name, takes, node.width, type.dtype.name, tuple(captures))
