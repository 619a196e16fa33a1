"""Routers over tokens of two dimensions, ``[B, S, E]``, as routers over rows, ``[T, E]``.

Many models flatten the ids and weights after routing. Softmax, top-k and arithmetic on single elements treat the last
dimension by itself, so flattening may as well come before: the same bits, and one row per token from the logits on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from moec.ir.core import Graph, Op, Value
from moec.ir.torch_bridge import resolve_target
from moec.ir.types import TensorType
from moec.passes.calls import call_args, call_op
from moec.passes.dce import erase_unused
from moec.passes.effects import is_pure
from moec.passes.matching import VIEWS, ancestors, arg, function, rank, same_dim, tensor
from moec.passes.raise_moe.activation import is_elementwise

# Where the dimension is named; such a call keeps rows apart if that is the last one.
_DIM_AT = {
    "softmax": 1, "_softmax": 1, "topk": 2, "max": 1, "amax": 1, "argmax": 1, "sum": 1, "gather": 1, "cumsum": 1,
    "logsumexp": 1, "unsqueeze": 1, "squeeze": 1,
}  # fmt: skip
_SAME = frozenset({"detach", "alias", "clone", "contiguous"})


class _Fixed(Exception):
    """This value cannot be computed row by row."""


@dataclass
class FlatRouter:
    """A router computed on flattened tokens, in place of the one that flattens what it found.

    Attributes:
        lead: ``(B, S)``.
        rows: T, their product.
        weights, ids: ``[T, k]``, as they now are.
        made: The flat value of each value met.
        new: The ops that compute them.
        moved: Uses that were changed, and what they used before.
    """

    graph: Graph
    lead: tuple[sympy.Expr, ...]
    rows: sympy.Expr
    weights: Value
    ids: Value
    made: dict[Value, Value] = field(default_factory=dict)
    new: list[Op] = field(default_factory=list)
    moved: list[tuple[Op, int, Value]] = field(default_factory=list)

    def adopt(self, old: Value) -> None:
        """Give the users of ``old``, a flattened value, the value that is flat from the start.

        Raises:
            _Fixed: There is none.
        """
        flat = self.flat(_unflattened(old, self.lead))
        if rank(flat) < rank(old):  # [T] where [T, 1] is wanted
            view = call_op("aten.unsqueeze.default", [flat, -1], {}, [old.type])
            assert flat.op is not None
            self.new.append(self.graph.insert_after(flat.op, view))
            flat = view.result
        flat.meta = dict(old.meta)
        for user, index in list(old.uses):
            self.moved.append((user, index, old))
            user.set_operand(index, flat)
        self.weights = flat if self.weights is old else self.weights
        self.ids = flat if self.ids is old else self.ids

    def finish(self) -> None:
        """Erase what only the original router needed."""
        for op in dict.fromkeys(old.op for _, _, old in self.moved if old.op is not None):
            erase_unused(op)

    def undo(self) -> None:
        """Leave the graph as it was."""
        for user, index, old in self.moved:
            user.set_operand(index, old)
        for op in reversed(self.new):
            if op.parent is self.graph:
                erase_unused(op)

    def flat(self, value: Value) -> Value:
        """``value`` [B, S, ..] as [T, ..].

        Raises:
            _Fixed: Its sizes are not known.
        """
        if value not in self.made:
            op = value.op
            if op is None or not self._by_rows(op):
                self.made[value] = self._view(value)
        return self.made[value]

    def _has_lead(self, value: Any) -> bool:
        t = tensor(value)
        return t is not None and t.shape[: len(self.lead)] == self.lead

    def _type(self, value: Value) -> TensorType:
        t = tensor(value)
        assert t is not None
        return t.with_(shape=(self.rows, *t.shape[len(self.lead) :]))

    def _view(self, value: Value) -> Value:
        rest = self._type(value).shape[1:]
        if not all(d.is_Integer for d in rest):
            raise _Fixed
        view = call_op("aten.reshape.default", [value, [-1, *map(int, rest)]], {}, [self._type(value)])
        at = self.graph.ops.index(value.op) + 1 if value.op is not None else 0
        self.new.append(self.graph.insert(at, view))
        return view.result

    def _by_rows(self, op: Op) -> bool:
        """Compute ``op`` on flattened operands; False if it looks beyond a row."""
        if op.name != "torch.call" or op.regions or not is_pure(op) or not all(map(self._has_lead, op.results)):
            return False
        args, kwargs = call_args(op)
        dim_at = _DIM_AT.get(function(op))
        if dim_at is not None:
            source = tensor(args[0])
            room = (source.rank if source is not None else 0) + (function(op) == "unsqueeze")
            dim = arg(op, dim_at, "dim", -1 if function(op) == "topk" else None)
            one = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
            if not isinstance(one, int) or one % room < len(self.lead) or one % room != room - 1:
                return False
            args = tuple(([-1] if one is not dim else -1) if i == dim_at else a for i, a in enumerate(args))
            kwargs = {k: v for k, v in kwargs.items() if k != "dim"} | ({"dim": -1} if "dim" in kwargs else {})
        elif "memory_format" in kwargs or _draws(op) or not (is_elementwise(op) or function(op) in _SAME):
            return False
        led = [v for v in op.operands if self._has_lead(v) and (dim_at or rank(v) == rank(op.results[0]))]
        # What else there is must stand along the last dimensions alone.
        if any(rank(v) > (0 if dim_at else rank(op.results[0]) - len(self.lead)) for v in op.operands if v not in led):
            return False
        swap = {v: self.flat(v) for v in led}
        new = call_op(
            op.attrs["target"],
            _swapped(args, swap),
            _swapped(kwargs, swap),
            [self._type(r) for r in op.results],
            loc=op.loc,
            names=[r.name for r in op.results],
        )
        self.new.append(self.graph.insert_after(op, new))
        self.made.update(zip(op.results, new.results, strict=True))
        return True


def _swapped(tree: Any, swap: dict[Value, Value]) -> Any:
    if isinstance(tree, Value):
        return swap.get(tree, tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_swapped(v, swap) for v in tree)
    return {k: _swapped(v, swap) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _draws(op: Op) -> bool:
    """True for calls that draw random numbers: drawn again, they are others."""
    target = resolve_target(op.attrs["target"])
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _unflattened(value: Value, lead: tuple[sympy.Expr, ...]) -> Value:
    """What ``value`` was before its tokens were flattened, [B, S] if it is [T, 1]; itself if they have not been.

    Args:
        value: ``[T, ..]``.
        lead: Its tokens' dimensions.
    """
    flat, source = tensor(value), value
    while source.op is not None and function(source.op) in VIEWS:
        source = arg(source.op, 0, "self")
        t = tensor(source)
        if t is None or flat is None:
            break
        if t.shape == (*lead, *flat.shape[1:]) or (t.shape == lead and flat.shape[1:] == (1,)):
            return source
    return value


def _lead(value: Value, rows: sympy.Expr) -> tuple[sympy.Expr, ...] | None:
    """``(B, S)`` with ``B * S`` rows, if ``value`` [B, S, ..] has such dimensions in front."""
    t = tensor(value)
    return t.shape[:2] if t is not None and t.rank > 2 and same_dim(t.shape[0] * t.shape[1], rows) else None


def flat_router(graph: Graph, weights: Value, ids: Value, stops: Iterable[Value]) -> FlatRouter | None:
    """Rewrite the router of ``weights`` and ``ids`` [T, k] to flattened tokens; None where there is nothing to flatten.

    Args:
        graph: Changed in place; :meth:`FlatRouter.undo` takes it back.
        weights, ids: What the block uses.
        stops: Where the router begins.
    """
    rows = tensor(ids)
    inside = ancestors([weights, ids], stops)
    ordered = [op for op in graph.ops if op in inside]
    leads = [lead for op in ordered for v in op.operands if rows and (lead := _lead(v, rows.shape[0])) is not None]
    if not leads or rows is None:
        return None
    found = FlatRouter(graph, leads[0], rows.shape[0], weights, ids)
    try:
        for op in ordered:
            for value in op.results:
                t = tensor(value)
                if (
                    t is not None
                    and t.rank
                    and t.shape[0] == rows.shape[0]
                    and _unflattened(value, found.lead) is not value
                ):
                    found.adopt(value)
    except _Fixed:
        found.undo()
        return None
    return found if found.moved else None
