"""The pass ``overlap``.

Contract:
1. A layer whose experts lie on several ranks runs in chunks: while the experts of one compute, the rows of the next
   travel there and those of the last travel home. Forward and backward are cut each for itself.
2. How many chunks, how large, along what, and which experts each holds, is what the cost model says ends soonest; of
   what ends within 1 % of the soonest, experts as they stand and the fewest chunks, the whole layer first of all.
   Without a cost model, links or loads the pass says so and does nothing, unless it is told the number of chunks.
3. Bits stay: backwards are cut along experts alone, so that each gradient is made of the same rows in the same order.
4. Where rows travel between nodes and then inside them, forwards are cut along tokens, and the cost model chooses when
   chunks are sent on from one tier to the other.
5. What is computed beside a layer (a shared expert that ``carry-shared-experts`` put there) is computed where ranks
   would wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, Literal

from moec.ir.beside import beside_experts, own_experts
from moec.ir.core import Graph, Op
from moec.ir.opdef import op_def
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.overlap.by_experts import cut_by_experts
from moec.passes.overlap.by_tokens import cut_by_tokens
from moec.passes.overlap.chunks import Chunks, Whole
from moec.passes.overlap.cuts import Sets, expert_ranges
from moec.passes.overlap.fill import FRONT, PIECES, Places, put
from moec.passes.overlap.legs import Turns
from moec.passes.overlap.order import reorder
from moec.passes.overlap.plan import BACKWARD, plan, plan_filled, read_beside, read_layer
from moec.passes.overlap.policies import uncut
from moec.passes.overlap.search import MOST
from moec.passes.overlap.tier_plan import check_direction, over_tiers, plan_tiers
from moec.passes.overlap.tier_search import TieredSchedule
from moec.passes.registry import register_pass

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class _Chosen:
    """What is done to a program.

    Attributes:
        along: What it is cut along.
        sizes: Units of every chunk; one chunk is the whole.
        why: What to say of it.
        own_first: Own rows come first.
        places: Where what stands beside the layer is computed.
        sets: Which experts are in every chunk; empty for as they stand.
        turns: When chunks are sent on, where their rows travel over two tiers of links.
    """

    along: str
    sizes: tuple[int, ...]
    why: str
    own_first: bool = False
    places: Places = FRONT
    sets: Sets = ()
    turns: Turns | None = None


@register_pass
@dataclass(frozen=True)
class Overlap(Pass):
    """Hides the all-to-alls of expert parallelism behind the experts: chunks that are sent while others compute.

    Runs after ``expert-parallel``. Times come from the cost model, rows from the routing profile. Where rows travel
    between nodes and then inside them, forwards alone are cut, along tokens.

    Attributes:
        policy: Who chooses. ``auto``: the cost model, freely. The others are for comparison: ``none``; ``two`` equal
            chunks of tokens (torchtitan); ``tutel``, the best of 1, 2, 4 or 8 such chunks; ``fsmoe``, the one of these
            that FSMoE's formulas name (arXiv:2501.10714). Backwards are cut along experts where these would cut tokens.
        chunks: So many equal chunks, and nobody is asked; 0 for the policy.
        along: What these are cut along; a backward is cut along experts always.
        tokens: Tokens of a rank in a step, spread evenly over the experts, where there is no profile; 0 for none.
        rank: The rank that the graph is for, so that its own rows may come first, and its experts in an order of their
            own; -1 where nobody says.
    """

    name: ClassVar[str] = "overlap"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "rows travel while experts compute, in chunks that the cost model chooses"

    policy: Literal["auto", "none", "two", "tutel", "fsmoe"] = "auto"
    chunks: int = 0
    along: Literal["experts", "tokens"] = "experts"
    tokens: int = 0
    rank: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.chunks <= MOST:
            raise ValueError(f"chunks is a number up to {MOST}, or 0 for what the policy chooses")
        if self.tokens < 0:
            raise ValueError("tokens is a number of tokens, or 0 where nobody knows")

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        cut = 0
        for op in [op for op in graph.ops if op.name == "moe.parallel_experts"]:
            for place, direction in enumerate(DIRECTIONS):
                try:
                    chosen = self._choose(op, place, ctx)
                    made = _cut(op, place, chosen, self.rank)
                except Whole as reason:
                    ctx.remark("missed", self.name, f"the {direction} stays whole: {reason}", op)
                    continue
                what = f"the {direction} {_told(chosen, bool(beside_experts(op.regions[place])), self.rank)}"
                if not ctx.take_fuel(self.name, what, op):
                    return PassResult(cut > 0, {"cut": cut})
                ctx.remark("applied", self.name, what, op)
                reorder(made, put(made, chosen.places), chosen.turns)
                op.regions[place] = made
                made.parent_op = op
                cut += 1
        return PassResult(cut > 0, {"cut": cut})

    def _choose(self, op: Op, place: int, ctx: PassContext) -> _Chosen:
        """What to do with one direction.

        Raises:
            Whole: Nothing; with the reason.
        """
        if len(own_experts(op.regions[place])) > 1:
            raise Whole("it is cut already")
        check_direction(op, place)
        if self.chunks:
            along = "experts" if place == BACKWARD else self.along
            own = max(op_def(op.name).attr(op, "sizes"))
            count = min(self.chunks, own) if along == "experts" else self.chunks
            if count < 2:
                raise Whole("one chunk is the whole")
            return _Chosen(along, (1,) * count, "")
        if over_tiers(op.regions[place]):
            return _over_tiers(*plan_tiers(op, ctx, self.policy, self.tokens))
        layer = read_layer(op, place, ctx, self.tokens)
        found, whole = plan(layer, place, self.policy, self.rank >= 0), uncut(layer)
        places, beside = FRONT, read_beside(op, place, layer.rows, ctx)
        if beside is not None:
            filled = plan_filled(layer, place, self.policy, self.rank >= 0, beside)
            found, places = filled.schedule, filled.places
            whole = replace(whole, seconds=whole.seconds + max(beside.chunk().compute))
        if not found.cut and places == FRONT:
            raise Whole(f"in one piece it takes {_ms(whole.seconds)}, and no chunks that may be cut take less")
        why = f": {_ms(found.seconds)} instead of {_ms(whole.seconds)}"
        return _Chosen(found.along, found.sizes, why, found.own_first, places, found.sets)


def _over_tiers(found: TieredSchedule, whole: float) -> _Chosen:
    """What is done to a forward whose rows travel between nodes and then inside them, and take ``whole`` seconds uncut.

    Raises:
        Whole: Nothing; with the reason.
    """
    if not found.cut and found.places == FRONT:
        raise Whole(f"in one piece it takes {_ms(whole)}, and no chunks of tokens take less")
    why = f": {_ms(found.seconds)} instead of {_ms(whole)}"
    return _Chosen("tokens", found.sizes, why, places=found.places, turns=found.turns)


def _cut(op: Op, place: int, chosen: _Chosen, rank: int) -> Graph:
    sizes = op_def(op.name).attr(op, "sizes")
    if len(chosen.sizes) == 1 and not chosen.own_first:
        return op.regions[place].clone()
    if chosen.sets:
        return cut_by_experts(op.regions[place], Chunks.of(sizes, chosen.sets, rank, chosen.own_first))
    if chosen.along == "tokens":
        return cut_by_tokens(op.regions[place], chosen.sizes)
    edges = expert_ranges(sizes, sum(chosen.sizes))
    ends = [edges[at] for at in (0, *accumulate(chosen.sizes))]
    return cut_by_experts(op.regions[place], Chunks(sizes, ends, rank if chosen.own_first else -1))


def _told(chosen: _Chosen, beside: bool, rank: int) -> str:
    """What is done, in words."""
    own = "own rows first, then " if chosen.own_first else ""
    many = len(chosen.sizes) > 1 or chosen.own_first
    cut = f"in {own}{len(chosen.sizes)} chunks of {chosen.along} {chosen.sizes}" if many else "in one piece"
    if chosen.sets:
        mine = " | ".join(" ".join(map(str, chunk[rank])) or "none" for chunk in chosen.sets)
        cut = f"in {own}{len(chosen.sizes)} chunks of experts in another order (this rank's: {mine})"
    last = len(chosen.sizes) + chosen.own_first
    where = [
        "before all chunks" if at == 0 else "behind all chunks" if at == last else f"before chunk {at + 1}"
        for at, _ in chosen.places
    ]
    shares = [f"{pieces}/{PIECES} " if len(chosen.places) > 1 else "" for _, pieces in chosen.places]
    told = " and ".join(share + place for share, place in zip(shares, where, strict=True))
    return f"{cut}{f', what stands beside {told}' if beside else ''}{chosen.why}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
