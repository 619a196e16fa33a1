"""Regions of whole rows: what each traced op of one means as steps of a program that has one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from moec.backends.calls import Language, UnsupportedError
from moec.ir.core import Graph, Op, Value
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import TensorType
from moec.passes.matching import arg, function, last_dim


class RowValue(Protocol):
    """A value of a row program.

    Attributes:
        name: What expressions call it.
        width: Its columns, or None for one number a row.
        moving: Depends on the row, not on captured tensors alone.
    """

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int | None: ...
    @property
    def moving(self) -> bool: ...


N = TypeVar("N", bound=RowValue)


class RowProgram(Protocol[N]):
    """What a backend builds from a region of whole rows, value by value.

    Attributes:
        language: What expressions of values are written in.
        widest: Columns that a row may have; None for any number.
    """

    language: Language
    widest: int | None

    def given(self, width: int) -> N:
        """The row that the function is given."""

    def capture(self, index: int, dtype: str, width: int | None) -> N:
        """Captured tensor ``index``: an element for every column, or one number."""

    def each(self, text: str, operands: Sequence[N], dtype: str = "f32") -> N:
        """An expression, ``text`` with the operands' names in it, rounded to ``dtype``."""

    def total(self, node: N) -> N:
        """The sum over a row."""

    def largest(self, node: N) -> N:
        """The largest element of a row."""

    def smallest(self, node: N) -> N:
        """The smallest element of a row."""

    def piece(self, node: N, start: int, width: int, step: int = 1) -> N:
        """Columns ``start``, ``start + step``, ...: ``width`` of them.

        Raises:
            UnsupportedError: The program cannot take a value of this kind apart.
        """

    def join(self, nodes: Sequence[N]) -> N:
        """Rows side by side.

        Raises:
            UnsupportedError: The program cannot put rows together.
        """


@dataclass
class _Reader(Generic[N]):
    """A region half read: its values so far."""

    where: str
    program: RowProgram[N]
    rows: Any  # the first dimension of everything that holds rows
    nodes: dict[Value, N] = field(default_factory=dict)

    def typed(self, value: Value, what: str) -> TensorType:
        type = value.type
        if not isinstance(type, TensorType) or type.dtype.name not in self.program.language.types:
            raise UnsupportedError(f"{self.where} has {what} of type {getattr(type, 'dtype', type)}")
        return type

    def columns(self, value: Value, what: str) -> int:
        shape = self.typed(value, what).shape
        if not (shape and shape[-1].is_Integer):
            raise UnsupportedError(f"{self.where} has {what} of shape {list(shape)}")
        width, widest = int(shape[-1]), self.program.widest
        if width < 2 or (widest is not None and width > widest):
            raise UnsupportedError(f"{self.where} has {what} of {width} column{'' if width == 1 else 's'}")
        return width

    def capture(self, index: int, value: Value) -> None:
        type = self.typed(value, "a captured tensor")
        if type.shape in ((), (1,)):
            width = None
        elif type.rank == 1 or (type.rank == 2 and type.shape[0] == 1):
            width = self.columns(value, "a captured tensor")
        else:
            raise UnsupportedError(f"{self.where} has a captured tensor of shape {list(type.shape)}")
        self.nodes[value] = self.program.capture(index, type.dtype.name, width)

    def read(self, op: Op) -> None:
        if op.name != "torch.call" or op.regions:
            raise UnsupportedError(f"{self.where} holds {op.attrs.get('target', op.name)}")
        target = op.attrs["target"]
        types = [self.typed(r, f"a result of {target}") for r in op.results]
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

    def each(self, op: Op, moving: list[Value]) -> N:
        operands = [self.nodes[v] for v in op.operands]
        names = {v: self.nodes[v].name for v in op.operands}
        text = self.program.language.expression(op, names, self.where)
        ranks = {v.type.rank for v in moving if isinstance(v.type, TensorType)}
        widths = {n.width for n in operands if n.width is not None}
        if len(widths) > 1 or (moving and ranks != {self.typed(op.result, "a result").rank}):
            raise UnsupportedError(f"{self.where} calls {op.attrs['target']} on rows of different shapes")
        return self.rounded(op, text, operands)

    def row(self, op: Op, dim: Any) -> N:
        """The operand of an op along the columns of a row."""
        node = self.nodes[op.operands[0]]
        if not last_dim(op.operands[0], dim) or not node.moving or node.width is None:
            raise UnsupportedError(f"{self.where} calls {op.attrs['target']} along another dimension than a row's")
        return node

    def rounded(self, op: Op, text: str, operands: Sequence[N]) -> N:
        return self.program.each(text, operands, self.typed(op.results[0], "a result").dtype.name)

    def spelled(self, name: str, *operands: N) -> N:
        """The op called ``name`` in f32."""
        return self.program.each(self.program.language.spell(name, *(o.name for o in operands)), operands)

    def over(self, node: N, count: float) -> str:
        """``node`` divided by a number."""
        return self.program.language.spell("div", node.name, self.program.language.number(count))

    def mean(self, node: N) -> N:
        total = self.program.total(node)
        return self.program.each(self.over(total, node.width or 1), [total])

    def scaled(self, op: Op, node: N, weight: Any, bias: Any) -> N:
        """``node`` times a captured weight, plus a captured bias, where there are any."""
        text, operands = node.name, [node]
        for name, value in (("mul", weight), ("add", bias)):
            if value is not None:
                operands.append(self.nodes[value])
                text = self.program.language.spell(name, text, self.nodes[value].name)
        return self.rounded(op, text, operands)


def _sum(r: _Reader[N], op: Op) -> list[N]:
    node = r.row(op, arg(op, 1, "dim"))
    made = r.mean(node) if function(op) == "mean" else r.program.total(node)
    return [r.rounded(op, made.name, [made])]


def _extreme(r: _Reader[N], op: Op) -> list[N]:
    node = r.row(op, arg(op, 1, "dim"))
    return [r.program.largest(node) if function(op) == "amax" else r.program.smallest(node)]


def _centred(r: _Reader[N], node: N) -> N:
    return r.spelled("sub", node, r.mean(node))


def _norm(r: _Reader[N], op: Op) -> list[N]:
    node = r.row(op, arg(op, 2, "dim"))
    if arg(op, 1, "ord", arg(op, 1, "p", 2)) != 2:
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} of another order than 2")
    total = r.program.total(r.spelled("square", node))
    return [r.rounded(op, r.program.language.spell("sqrt", total.name), [total])]


def _var(r: _Reader[N], op: Op) -> list[N]:
    node = r.row(op, arg(op, 1, "dim"))
    correction = op.attrs.get("kwargs", {}).get("correction", 1)
    if not isinstance(correction, (int, float)) or op.attrs["target"] != "aten.var.correction":
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']}")
    total = r.program.total(r.spelled("square", _centred(r, node)))
    return [r.rounded(op, r.over(total, max(0, (node.width or 1) - correction)), [total])]


def _softmax(r: _Reader[N], op: Op) -> list[N]:
    node = r.row(op, arg(op, 1, "dim"))
    power = r.spelled("exp", r.spelled("sub", node, r.program.largest(node)))
    total = r.program.total(power)
    return [r.rounded(op, r.program.language.spell("div", power.name, total.name), [power, total])]


def _rms_norm(r: _Reader[N], op: Op) -> list[N]:
    node = _normalized(r, op)
    eps = arg(op, 3, "eps")
    eps = torch.finfo(TO_TORCH[r.typed(op.operands[0], "rows").dtype.name]).eps if eps is None else eps
    return [r.scaled(op, _unit(r, node, eps), arg(op, 2, "weight"), None)]


def _layer_norm(r: _Reader[N], op: Op) -> list[N]:
    node = _unit(r, _centred(r, _normalized(r, op)), arg(op, 4, "eps", 1e-5))
    return [r.scaled(op, node, arg(op, 2, "weight"), arg(op, 3, "bias"))]


def _normalized(r: _Reader[N], op: Op) -> N:
    shape = arg(op, 1, "normalized_shape")
    return r.row(op, -1 if isinstance(shape, (list, tuple)) and len(shape) == 1 else None)


def _unit(r: _Reader[N], node: N, eps: float) -> N:
    """A row over the root of its mean square."""
    mean, language = r.mean(r.spelled("square", node)), r.program.language
    shifted = r.program.each(language.spell("add", mean.name, language.number(eps)), [mean])
    return r.spelled("mul", node, r.spelled("rsqrt", shifted))


def _cut(r: _Reader[N], op: Op) -> list[N]:
    """``chunk``, ``split`` and ``split_with_sizes``: pieces one after another, as wide as the results' types say."""
    node, start, made = r.row(op, arg(op, 2, "dim", 0)), 0, []
    for result in op.results:
        width = r.columns(result, f"a result of {op.attrs['target']}")
        made.append(r.program.piece(node, start, width))
        start += width
    return made


def _slice(r: _Reader[N], op: Op) -> list[N]:
    node, start, step = r.row(op, arg(op, 1, "dim", 0)), arg(op, 2, "start", 0), arg(op, 4, "step", 1)
    start = 0 if start is None else start
    assert node.width is not None
    if not isinstance(start, int) or not isinstance(step, int):
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} with bounds that are not fixed")
    start = min(start + node.width if start < 0 else start, node.width)
    width = r.columns(op.result, f"a result of {op.attrs['target']}")
    return [r.program.piece(node, max(0, start), width, 1 if function(op) == "narrow" else step)]


def _cat(r: _Reader[N], op: Op) -> list[N]:
    pieces = arg(op, 0, "tensors")
    if not all(last_dim(v, arg(op, 1, "dim", 0)) for v in pieces):
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} along another dimension than a row's")
    nodes = [r.nodes[v] for v in pieces]
    if not all(n.moving and n.width for n in nodes):
        raise UnsupportedError(f"{r.where} joins rows with what is no row")
    return [r.program.join(nodes)]


def _same(r: _Reader[N], op: Op) -> list[N]:
    """A dimension of size one more or less: columns stay columns."""
    node = r.nodes[op.operands[0]]
    if node.moving and node.width is not None:
        raise UnsupportedError(f"{r.where} calls {op.attrs['target']} on a whole row")
    return [node]


_STEPS: dict[str, Callable[[_Reader[Any], Op], list[Any]]] = {
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
    "cat": _cat,
}


def read_rows(region: Graph, where: str, program: RowProgram[N]) -> tuple[N, str]:
    """Build the program of a region of whole rows.

    Args:
        region: Takes the rows ``[R, N]``, then its captures; gives rows ``[R, M]``.
        where: What it is, for messages ("the activation").
        program: Takes its values.

    Returns:
        The result, and its element type.

    Raises:
        UnsupportedError: It mixes rows, or an op in it is not known.
    """
    first, *captures = region.args
    reader = _Reader(where, program, None)
    reader.rows = reader.typed(first, "rows").shape[0]
    reader.nodes[first] = program.given(reader.columns(first, "rows"))
    for i, capture in enumerate(captures):
        reader.capture(i, capture)
    for op in region.ops:
        if op is not region.terminator:
            reader.read(op)
    (result,) = region.terminator.operands
    node, type = reader.nodes[result], reader.typed(result, "a result")
    if node.width is None or not node.moving:
        raise UnsupportedError(f"{where} gives {type.dtype}{list(type.shape)}, which are no rows")
    return node, type.dtype.name
