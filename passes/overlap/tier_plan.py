"""From a layer in the graph to its schedule where its rows travel over two tiers of links."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.passes.base import PassContext
from moec.passes.overlap.by_experts import Whole
from moec.passes.overlap.costs import FrontCosts, OverlapCosts, RoutingReach
from moec.passes.overlap.plan import BACKWARD, FORWARD, choices, read_beside, read_rows
from moec.passes.overlap.reach import busiest_rows, expected_copies
from moec.passes.overlap.tier_search import Search, TieredSchedule
from moec.passes.overlap.tiers import Carried, TieredLayer
from moec.passes.overlap.trips import Trip, over_tiers, trips

__all__ = ["check_direction", "over_tiers", "plan_tiers", "read_tiers"]


def check_direction(op: Op, place: int) -> None:
    """Refuse what is never cut.

    Raises:
        Whole: A backward of a layer over tiers.
    """
    if place == BACKWARD and over_tiers(op.regions[FORWARD]):
        raise Whole(
            "a token goes to a node once for all its experts there, so that experts cannot be cut; "
            "and along tokens gradients of weights would be added up in another order"
        )


def read_tiers(op: Op, ctx: PassContext, rows: Sequence[Sequence[float]]) -> TieredLayer:
    """The forward of a ``moe.parallel_experts`` over tiers as the cost model sees it.

    Args:
        op: The layer.
        ctx: Where the cost model and the profile are.
        rows: Rows that every rank sends to every expert, [N][E].

    Raises:
        Whole: Something is not known; with what would help.
    """
    attr, costs = op_def(op.name).attr, ctx.cost_model
    sizes, group, ranks = attr(op, "sizes"), attr(op, "group"), len(attr(op, "sizes"))
    found = trips(op.regions[FORWARD])
    if found is None:
        raise Whole(f"what the form {attr(op, 'form')!r} sends is not predicted; ask for a number of chunks of tokens")
    if not isinstance(costs, OverlapCosts):
        raise Whole("there is no cost model; ask for a number of chunks of tokens")
    nodes = _members(op, found.groups[0])
    members = dict(zip(found.groups, (nodes, ranks // nodes), strict=True))
    links = [costs.transport(name, count) for name, count in members.items()]
    for name, link in zip(found.groups, links, strict=True):
        if link is None:
            raise Whole(f"nobody measured the links of group {name!r}; ask for a number of chunks of tokens")
    times = costs.expert_times(op)
    if times is None:
        raise Whole("the cost model does not know its experts; ask for a number of chunks of tokens")
    copies = None
    if isinstance(ctx.profile, RoutingReach):
        copies = ctx.profile.reach(op.loc.module, sizes, nodes)
    most = busiest_rows(rows, copies or expected_copies(rows, sizes, nodes, choices(op)), sizes, nodes)

    def carried(way: Sequence[Trip]) -> tuple[Carried, ...]:
        return tuple(Carried(t.tier, t.messages, t.bytes * getattr(most, t.unit) if t.unit else 0.0) for t in way)

    home = max(map(sum, rows)) / choices(op) * sum(t.bytes for t in found.back if t.tier == 0)
    edges = [0, *accumulate(sizes)]
    loads = [sum(column) for column in zip(*rows, strict=True)]
    return TieredLayer(
        tuple(tuple(loads[a:b]) for a, b in pairwise(edges)),
        times,
        tuple(link for link in links if link is not None),
        carried(found.there),
        carried(found.back),
        costs.copying(group, home),
        costs.chunk_seconds(op, FORWARD, "tokens"),
        costs.front_seconds(op, FORWARD, "tokens") if isinstance(costs, FrontCosts) else 0.0,
        tuple(costs.burden(name) for name in found.groups),
    )


def _members(op: Op, group: str) -> int:
    """Ranks of a group that a program talks in."""
    return next(int(o.attrs["ranks"]) for o in op.regions[FORWARD].ops if o.attrs.get("group") == group)


def plan_tiers(op: Op, ctx: PassContext, policy: str, tokens: int) -> tuple[TieredSchedule, float]:
    """The schedule of a policy for a forward over tiers, and seconds of the layer whole, then of what is beside it.

    Args:
        op: The layer.
        ctx: Where the cost model and the profile are.
        policy: One of :data:`moec.passes.overlap.policies.POLICIES`.
        tokens: Of a rank, where the profile does not know the layer.

    Raises:
        Whole: Something is not known; with what would help.
    """
    rows = read_rows(op, ctx, tokens)
    layer, beside = read_tiers(op, ctx, rows), read_beside(op, FORWARD, rows, ctx)
    whole = Search(layer).choose("none").seconds + (0.0 if beside is None else max(beside.chunk().compute))
    return Search(layer, beside).choose(policy), whole
