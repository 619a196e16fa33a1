"""Where to compute what stands beside a layer: while ranks would wait for rows, so that the step ends soonest.

It needs nothing that travels and nothing of the layer waits for it, so it goes wherever a rank is idle: before the
first rows are there, between chunks, or behind the last experts, while results come home. To the timeline it is a chunk
that does not travel. Forwards it may be cut into two pieces of its tokens, one before all chunks and one behind them;
backwards it is whole, since gradients of its weights would be added up in another order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import sympy

from moec.ir.beside import beside_experts
from moec.ir.builder import Builder
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType, Type
from moec.passes.overlap.costs import ExpertTimes
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.policies import Schedule, candidates, simplest
from moec.passes.overlap.search import MOST
from moec.passes.overlap.timeline import Chunk, makespan

PIECES = 8
"""The units that a share of the tokens is counted in."""
Places = tuple[tuple[int, int], ...]
"""Before which chunk, and how many of :data:`PIECES` of the tokens; a place past the last chunk is behind all."""
FRONT: Places = ((0, PIECES),)


@runtime_checkable
class BesideCosts(Protocol):
    """What ``ctx.cost_model`` must answer for a place to be chosen."""

    def layer_times(self, op: Op, group: str, backward: bool = False) -> ExpertTimes | None:
        """Of a ``moe.experts`` in a program of a group's ranks; None where the model does not know it."""


@dataclass(frozen=True)
class Beside:
    """What is computed beside a layer.

    Attributes:
        times: Of each of these layers of experts.
        tokens: Of every rank.
        whole: It may not be cut.
    """

    times: tuple[ExpertTimes, ...]
    tokens: tuple[float, ...]
    whole: bool = False

    def chunk(self, pieces: int = PIECES) -> Chunk:
        """The time of so many pieces on every rank; nothing travels."""
        share = pieces / PIECES
        return Chunk(0.0, tuple(sum(t.seconds([n * share]) for t in self.times) for n in self.tokens), 0.0)


@dataclass(frozen=True)
class Filled:
    """A schedule, and where in it what stands beside is computed; its seconds are those of both."""

    schedule: Schedule
    places: Places


def timed(chunks: Sequence[Chunk], beside: Beside, places: Places) -> list[Chunk]:
    """The chunks with what stands beside among them."""
    found: list[Chunk] = []
    for at in range(len(chunks) + 1):
        found += [beside.chunk(pieces) for place, pieces in places if place == at]
        found += chunks[at : at + 1]
    return found


def fill(found: Schedule, beside: Beside) -> Filled:
    """The best places in one schedule: whole anywhere, or some of it before all chunks and the rest behind them."""
    last = len(found.chunks)
    options: list[Places] = [((at, PIECES),) for at in range(last + 1)]
    if not beside.whole:
        options += [((0, n), (last, PIECES - n)) for n in range(1, PIECES)]
    joining = found.seconds - makespan(found.chunks)
    spent = {o: makespan(timed(found.chunks, beside, o)) for o in options}
    best = min(options, key=lambda o: (spent[o], len(o)))
    return Filled(replace(found, seconds=spent[best] + joining), best)


def auto_filled(layer: Layer, allowed: Collection[str], beside: Beside, most: int = MOST) -> Filled:
    """The simplest schedule that is as good as the best, with what stands beside in it.

    Sizes of chunks are also searched for with all or half of it before the first: rows that arrive meanwhile are
    hidden without being cut.
    """
    found = candidates(layer, allowed, most)
    for pieces in (PIECES,) if beside.whole else (PIECES, PIECES // 2):
        found += candidates(layer, allowed, most, beside.chunk(pieces))
    filled = [fill(s, beside) for s in found]
    chosen = simplest([f.schedule for f in filled])
    return next(f for f in filled if f.schedule is chosen)


def put(region: Graph, places: Places) -> dict[Op, int]:
    """Cut what stands beside into pieces; before which chunk each is to be computed.

    Args:
        region: A rank's program; changed where there are several places.
        places: Where.
    """
    experts = beside_experts(region)
    if len(places) == 1:
        return dict.fromkeys(experts, places[0][0])
    found: dict[Op, int] = {}
    for op in experts:
        b, first, made = Builder(region, op.loc).insert_before(op), 0, []
        for number, (place, pieces) in enumerate(places):
            attrs = {"first": first, "last": first + pieces, "of": PIECES}
            some = [
                b.op("moe.token_part", v, attrs=attrs, result_types=[_some(v.type, number)]).result
                for v in op.operands[:3]
            ]
            part = b.op(
                op.name, *some, *op.operands[3:], attrs=op.attrs, result_types=[_some(op.result.type, number)],
                regions=[r.clone() for r in op.regions], groups=op.groups,
            )  # fmt: skip
            found[part] = place
            made.append(part.result)
            first += pieces
        whole: Value = b.call("aten.cat.default", [made], result_types=[op.result.type]).result
        op.result.replace_all_uses_with(whole)
        op.erase()
    return found


def _some(type: Type, number: int) -> TensorType:
    """Of a piece of the tokens: their number is a symbol of its own."""
    assert isinstance(type, TensorType)
    return type.with_(shape=(sympy.Symbol(f"F{number}", integer=True), *type.shape[1:]))
