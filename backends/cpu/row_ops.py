"""What each traced op of a region of whole rows means as steps of a row program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.backends.calls import UnsupportedError
from moec.backends.cpu.cpp import C_TYPES
from moec.backends.cpu.expression import expression, number
from moec.backends.cpu.row_program import Node, RowProgram
from moec.ir.core import Graph, Op, Value
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import TensorType
from moec.passes.matching import arg, function, last_dim

_NO_OPS = frozenset({"unsqueeze", "squeeze"})


@dataclass(frozen=True)
class RowFunction:
    """A region as the body of a C++ function of a row.

    Attributes:
        takes: Columns of the row it is given.
        width, dtype: Of the result.
        floats: Of working memory.
    """

    body: str
    takes: int
    width: int
    dtype: str
    floats: int


def _typed(where: str, value: Value, what: str) -> TensorType:
    type = value.type
    if not isinstance(type, TensorType) or type.dtype.name not in C_TYPES:
        raise UnsupportedError(f"{where} has {what} of type {getattr(type, 'dtype', type)}")
    return type


def _columns(where: str, value: Value, what: str) -> int:
    shape = _typed(where, value, what).shape
    if not (shape and shape[-1].is_Integer):
        raise UnsupportedError(f"{where} has {what} of shape {list(shape)}")
    if int(shape[-1]) < 2:
        raise UnsupportedError(f"{where} has {what} with one column")
    return int(shape[-1])


@dataclass
class _Reader:
    """A region half read: its values so far."""

    where: str
    program: RowProgram
    rows: Any  # the first dimension of everything that holds rows
    nodes: dict[Value, Node] = field(default_factory=dict)

    def capture(self, index: int, value: Value) -> None:
        type = _typed(self.where, value, "a captured tensor")
        if type.shape in ((), (1,)):
            width = None
        elif type.rank == 1 or (type.rank == 2 and type.shape[0] == 1):
            width = _columns(self.where, value, "a captured tensor")
        else:
            raise UnsupportedError(f"{self.where} has a captured tensor of shape {list(type.shape)}")
        self.nodes[value] = self.program.capture(index, C_TYPES[type.dtype.name], width)

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

    def each(self, op: Op, moving: list[Value]) -> Node:
        type = op.result.type
        assert isinstance(type, TensorType)
        operands = [self.nodes[v] for v in op.operands]
        names = {v: self.nodes[v].name for v in op.operands}
        text = expression(op, names, self.where)
        ranks = {v.type.rank for v in moving if isinstance(v.type, TensorType)}
        widths = {n.width for n in operands if n.width is not None}
        if len(widths) > 1 or (moving and ranks != {type.rank}):
            raise UnsupportedError(f"{self.where} calls {op.attrs['target']} on rows of different shapes")
        return self.program.each(text, operands, C_TYPES[type.dtype.name])

    def row(self, op: Op, dim: Any) -> Node:
        """The operand of an op along the columns of a row."""
        node = self.nodes[op.operands[0]]
        if not last_dim(op.operands[0], dim) or not node.moving or node.width is None:
            raise UnsupportedError(f"{self.where} calls {op.attrs['target']} along another dimension than a row's")
        return node

    def rounded(self, op: Op, text: str, operands: Sequence[Node]) -> Node:
        type = op.results[0].type
        assert isinstance(type, TensorType)
        return self.program.each(text, operands, C_TYPES[type.dtype.name])

    def mean(self, node: Node) -> Node:
        total = self.program.total(node)
        return self.program.each(f"{total.name} / {number(node.width or 1)}", [total])

    def scaled(self, op: Op, node: Node, weight: Any, bias: Any) -> Node:
        """``node`` times a captured weight, plus a captured bias, where there are any."""
        text, operands = node.name, [node]
        for symbol, value in (("*", weight), ("+", bias)):
            if value is not None:
                operands.append(self.nodes[value])
                text = f"{text} {symbol} {self.nodes[value].name}"
        return self.rounded(op, text, operands)


def _sum(r: _Reader, op: Op) -> list[Node]:
    node = r.row(op, arg(op, 1, "dim"))
    made = r.mean(node) if function(op) == "mean" else r.program.total(node)
    return [r.rounded(op, made.name, [made])]


def _extreme(r: _Reader, op: Op) -> list[Node]:
    node = r.row(op, arg(op, 1, "dim"))
    if function(op) == "amax":
        return [r.program.largest(node)]
    most = r.program.largest(r.program.each(f"negate({node.name})", [node]))
    return [r.program.each(f"negate({most.name})", [most])]


def _squares(r: _Reader, node: Node) -> Node:
    return r.program.each(f"{node.name} * {node.name}", [node])


def _centred(r: _Reader, node: Node) -> Node:
    mean = r.mean(node)
    return r.program.each(f"{node.name} - {mean.name}", [node, mean])


def _norm(r: _Reader, op: Op) -> list[Node]:
    node = r.row(op, arg(op, 2, "dim"))
    if arg(op, 1, "ord", arg(op, 1, "p", 2)) != 2:
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} of another order than 2")
    total = r.program.total(_squares(r, node))
    return [r.rounded(op, f"root({total.name})", [total])]


def _var(r: _Reader, op: Op) -> list[Node]:
    node = r.row(op, arg(op, 1, "dim"))
    correction = op.attrs.get("kwargs", {}).get("correction", 1)
    if not isinstance(correction, (int, float)) or op.attrs["target"] != "aten.var.correction":
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']}")
    total = r.program.total(_squares(r, _centred(r, node)))
    return [r.rounded(op, f"{total.name} / {number(max(0, (node.width or 1) - correction))}", [total])]


def _softmax(r: _Reader, op: Op) -> list[Node]:
    node = r.row(op, arg(op, 1, "dim"))
    most = r.program.largest(node)
    power = r.program.each(f"exp({node.name} - {most.name})", [node, most])
    total = r.program.total(power)
    return [r.rounded(op, f"{power.name} / {total.name}", [power, total])]


def _rms_norm(r: _Reader, op: Op) -> list[Node]:
    node = _normalized(r, op)
    type = op.operands[0].type
    assert isinstance(type, TensorType)
    eps = arg(op, 3, "eps")
    eps = torch.finfo(TO_TORCH[type.dtype.name]).eps if eps is None else eps
    return [r.scaled(op, _unit(r, node, eps), arg(op, 2, "weight"), None)]


def _layer_norm(r: _Reader, op: Op) -> list[Node]:
    node = _centred(r, _normalized(r, op))
    return [r.scaled(op, _unit(r, node, arg(op, 4, "eps", 1e-5)), arg(op, 2, "weight"), arg(op, 3, "bias"))]


def _normalized(r: _Reader, op: Op) -> Node:
    shape = arg(op, 1, "normalized_shape")
    return r.row(op, -1 if isinstance(shape, (list, tuple)) and len(shape) == 1 else None)


def _unit(r: _Reader, node: Node, eps: float) -> Node:
    """A row over the root of its mean square."""
    mean = r.mean(_squares(r, node))
    inverse = r.program.each(f"set1(1.0f) / root({mean.name} + {number(eps)})", [mean])
    return r.program.each(f"{node.name} * {inverse.name}", [node, inverse])


def _cut(r: _Reader, op: Op) -> list[Node]:
    """``chunk``, ``split`` and ``split_with_sizes``: pieces one after another, as wide as the results' types say."""
    node, start, made = r.row(op, arg(op, 2, "dim", 0)), 0, []
    for result in op.results:
        width = _columns(r.where, result, f"a result of {op.attrs['target']}")
        made.append(r.program.piece(node, start, width))
        start += width
    return made


def _slice(r: _Reader, op: Op) -> list[Node]:
    node, start, step = r.row(op, arg(op, 1, "dim", 0)), arg(op, 2, "start", 0), arg(op, 4, "step", 1)
    start = 0 if start is None else start
    assert node.width is not None
    if not isinstance(start, int) or not isinstance(step, int):
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} with bounds that are not fixed")
    start = min(start + node.width if start < 0 else start, node.width)
    width = _columns(r.where, op.result, f"a result of {op.attrs['target']}")
    return [r.program.piece(node, max(0, start), width, 1 if function(op) == "narrow" else step)]


def _cat(r: _Reader, op: Op) -> list[Node]:
    pieces = arg(op, 0, "tensors")
    if not all(last_dim(v, arg(op, 1, "dim", 0)) for v in pieces):
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} along another dimension than a row's")
    nodes = [r.nodes[v] for v in pieces]
    if not all(n.moving and n.width for n in nodes):
        raise UnsupportedError(f"{r.where} joins rows with what is no row")
    return [r.program.join(nodes)]


def _same(r: _Reader, op: Op) -> list[Node]:
    """A dimension of size one more or less: columns stay columns."""
    node = r.nodes[op.operands[0]]
    if node.moving and node.width is not None:
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} on a whole row")
    return [node]


_STEPS: dict[str, Callable[[_Reader, Op], list[Node]]] = {
    **dict.fromkeys(("sum", "mean"), _sum),
    **dict.fromkeys(("amax", "amin"), _extreme),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _norm),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), _cut),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(_NO_OPS, _same),
    "var": _var,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "cat": _cat,
}


def compile_rows(region: Graph, where: str) -> RowFunction:
    """A region of whole rows as C++.

    Args:
        region: Takes the rows ``[R, N]``, then its captures; gives rows ``[R, M]``.
        where: What it is, for messages ("the activation").

    Raises:
        UnsupportedError: It mixes rows, or an op in it is not known.
    """
    first, *captures = region.args
    program = RowProgram(_columns(where, first, "rows"))
    assert isinstance(first.type, TensorType)
    reader = _Reader(where, program, first.type.shape[0])
    reader.nodes[first] = program.input
    for i, capture in enumerate(captures):
        reader.capture(i, capture)
    for op in region.ops:
        if op is not region.terminator:
            reader.read(op)
    (result,) = region.terminator.operands
    node, type = reader.nodes[result], _typed(where, result, "a result")
    if node.width is None or not node.moving:
        raise UnsupportedError(f"{where} gives {type.dtype}{list(type.shape)}, which are no rows")
    program.result(node)
    return RowFunction(program.body(), _columns(where, first, "rows"), node.width, type.dtype.name, program.floats)
