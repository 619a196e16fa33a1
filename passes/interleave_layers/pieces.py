"""What happens in a rank's program of a layer, with times: computing, starts and waits, cut where it may be left.

Rows and tokens are those that all ranks plan with, and what is read of the program is the same on all of them: so they
all come to the same decision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from moec.ir.beside import beside_experts, own_experts
from moec.ir.core import Graph, Op
from moec.ir.opdef import op_def
from moec.ir.staged import stops
from moec.ir.types import TensorType
from moec.passes.base import PassContext
from moec.passes.interleave_layers.beside import WorkCosts
from moec.passes.overlap.costs import OverlapCosts, RoutingLoads, burden_seconds
from moec.passes.overlap.fill import BesideCosts
from moec.passes.overlap.order import is_start, needs
from moec.passes.overlap.traffic import row_bytes


@dataclass(frozen=True)
class Step:
    """One thing that a program does.

    Attributes:
        kind: ``compute``; ``start`` of a collective; ``wait`` for one.
        seconds: Of computing, or on the links.
        burden: What a collective takes of what is computed meanwhile, seconds.
        of: Number of the start that a wait is for, counted in the layer.
    """

    kind: Literal["compute", "start", "wait"]
    seconds: float = 0.0
    burden: float = 0.0
    of: int = -1


Pieces = tuple[tuple[Step, ...], ...]


def pieces_of(op: Op, region: Graph, place: int, ctx: PassContext, tokens: int) -> Pieces | None:
    """The steps of a program, piece by piece; None where a time is not known.

    Args:
        op: The ``moe.parallel_experts`` (or ``moe.begin``).
        region: Its forward or its backward.
        place: 0 for a forward, 1 for a backward.
        ctx: Where the cost model and the profile are.
        tokens: Tokens of a rank in a call, spread evenly over the experts, where the profile does not know the layer.
    """
    costs, attr = ctx.cost_model, op_def(op.name).attr
    group, sizes, experts = attr(op, "group"), attr(op, "sizes"), attr(op, "experts")
    if not isinstance(costs, OverlapCosts) or attr(op, "form") != "flat":
        return None
    links, times = costs.transport(group, len(sizes)), costs.expert_times(op, place == 1)
    ids = op.operands[1].type
    if links is None or times is None or not isinstance(ids, TensorType):
        return None
    top_k, rows = int(ids.shape[1]), _profiled(op, ctx)
    if rows is None:
        if not tokens:
            return None
        rows = [[tokens * top_k / experts] * experts] * len(sizes)
    parts = _Parts(region, ids.shape[0], _busiest(rows, sizes), _leaving(rows, sizes))
    burden = costs.burden(group)
    steps: list[Step] = []
    starts: dict[Op, int] = {}
    cut: list[int] = []
    places = set(stops(region))
    for i, inner in enumerate(region.ops):
        if i in places:
            cut.append(len(steps))
        if is_start(inner):
            size = parts.sent(inner)
            if size is None:
                return None
            starts[inner] = len(starts)
            steps.append(Step("start", links.seconds(size), burden_seconds(burden, links, size) if size else 0.0))
        elif inner.name == "comm.wait":
            maker = inner.operands[0].op
            assert maker is not None
            steps.append(Step("wait", of=starts[maker]))
        elif inner in parts.share:
            steps.append(Step("compute", times.seconds(parts.loads(inner))))
        elif inner in parts.beside and isinstance(costs, BesideCosts):
            known = costs.layer_times(inner, group, place == 1)
            share = parts.beside[inner]
            steps.append(Step("compute", 0.0 if known is None else known.seconds([share * sum(rows[0]) / top_k])))
        elif inner is not region.terminator and isinstance(costs, WorkCosts):
            moved = parts.moved(inner, sum(rows[0]) / top_k, sum(rows[0]))
            if took := costs.op_seconds(inner, group, place, moved):
                steps.append(Step("compute", took))
    ends = [0, *cut, len(steps)]
    return tuple(tuple(steps[a:b]) for a, b in pairwise(ends))


def tokens_of(op: Op, ctx: PassContext) -> float:
    """Tokens of a rank in a call of a layer, by the profile; 0 where it does not know the layer."""
    ids, rows = op.operands[1].type, _profiled(op, ctx)
    return 0.0 if rows is None or not isinstance(ids, TensorType) else sum(rows[0]) / int(ids.shape[1])


def _profiled(op: Op, ctx: PassContext) -> Sequence[Sequence[float]] | None:
    sizes, experts = op_def(op.name).attr(op, "sizes"), op_def(op.name).attr(op, "experts")
    return ctx.profile.rows(op.loc.module, len(sizes), experts) if isinstance(ctx.profile, RoutingLoads) else None


def _owned(sizes: Sequence[int]) -> list[range]:
    starts = [sum(sizes[:r]) for r in range(len(sizes))]
    return [range(a, a + n) for a, n in zip(starts, sizes, strict=True)]


def _busiest(rows: Sequence[Sequence[float]], sizes: Sequence[int]) -> float:
    """Rows that come to the rank that gets most."""
    return max(sum(row[e] for row in rows for e in own) for own in _owned(sizes))


def _leaving(rows: Sequence[Sequence[float]], sizes: Sequence[int]) -> float:
    """Rows that cross the links of the rank with most of them, on the way there: those it sends or those it gets."""
    owned = _owned(sizes)
    sent = [sum(row) - sum(row[e] for e in own) for row, own in zip(rows, owned, strict=True)]
    got = [sum(row[e] for r, row in enumerate(rows) if r != me for e in own) for me, own in enumerate(owned)]
    return max(*sent, *got)


class _Parts:
    """Which part of the rows each chunk of a program has; equal ones for chunks of as many experts."""

    def __init__(self, region: Graph, tokens: Any, come: float, leave: float) -> None:
        self._before = needs(region)
        self._experts, self._come, self._leave = own_experts(region), come, leave
        self._tokens = tokens
        self._held = {e: self._count(e) for e in self._experts}
        total = sum(self._held.values()) or 1
        self.share = {e: held / total for e, held in self._held.items()}
        self.beside = {op: _of_tokens(op) for op in beside_experts(region)}
        self._starts = [op for op in region.ops if is_start(op) and op.group("rows") and not op.attrs.get("send_sizes")]
        self._chunk = {op: self._chunk_of(op) for op in self._starts}

    def _chunk_of(self, start: Op) -> tuple[bool, Op | None]:
        """Whether rows travel home, and the chunk that they are of."""
        made = [e for e in self._experts if e in self._before[start]]
        if made:
            return True, made[-1]
        return False, next((e for e in self._experts if start in self._before[e]), None)

    def _count(self, experts: Op) -> int:
        """How many experts a chunk holds: all that the op has weights of, or those among which rows come."""
        among = (op.attrs.get("among") for op in self._before[experts] if op.name == "moe.arrivals")
        return next((len(held) for held in among if held is not None), int(experts.attrs["experts"]))

    def loads(self, experts: Op) -> list[float]:
        """Rows of every expert of a chunk."""
        count = self._held[experts]
        return [self._come * self.share[experts] / count] * count if count else []

    def moved(self, op: Op, tokens: float, slots: float) -> float:
        """Bytes that an op reads and writes; what has neither a row for each token nor a fixed number has slots'."""
        found = 0.0
        for value in (*op.operands, *op.results):
            type = value.type
            if isinstance(type, TensorType) and type.rank and all(d.is_Integer for d in type.shape[1:]):
                first = type.shape[0]
                if first == self._tokens:
                    rows = tokens
                else:
                    rows = float(int(first)) if first.is_Integer else slots * self._part(op)
                found += rows * math.prod(int(d) for d in type.shape[1:]) * type.dtype.bits / 8
        return found

    def _part(self, op: Op) -> float:
        """The part of all rows that an op has, which may serve one chunk, some or all."""
        made = [e for e in self._experts if e in self._before[op]]
        serves = made or [e for e in self._experts if op in self._before[e]]
        return sum(self.share[e] for e in serves) if serves else 1.0

    def sent(self, start: Op) -> float | None:
        """Bytes of a start; 0 for a message that tells sizes, None where they are not known."""
        if start not in self._chunk:
            return 0.0
        width, (home, chunk) = row_bytes(start), self._chunk[start]
        if width is None or chunk is None:
            return None
        travel = {c for h, c in self._chunk.values() if h == home and c is not None}
        return self._leave * width * self.share[chunk] / sum(self.share[c] for c in travel)


def _of_tokens(op: Op) -> float:
    """The part of the tokens that an op of experts runs on."""
    maker: Any = op.operands[len(op.operands) > 0 and op.name == "moe.experts_backward"].op
    if maker is None or maker.name != "moe.token_part":
        return 1.0
    return float(maker.attrs["last"] - maker.attrs["first"]) / float(maker.attrs["of"])
