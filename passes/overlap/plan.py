"""From a layer in the graph to its schedule: what cost model and routing profile say of it, and what is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moec.ir.beside import beside_experts
from moec.ir.core import Op
from moec.ir.opdef import op_def
from moec.ir.types import TensorType
from moec.passes.base import PassContext
from moec.passes.overlap.chunks import Whole
from moec.passes.overlap.costs import FrontCosts, GradientCosts, OverlapCosts, RoutingLoads
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.fill import Beside, BesideCosts, Filled, auto_filled, fill
from moec.passes.overlap.policies import Schedule, choose, schedule
from moec.passes.overlap.traffic import traffic

FORWARD, BACKWARD = 0, 1


def read_layer(op: Op, place: int, ctx: PassContext, tokens: int = 0) -> Layer:
    """One direction of a ``moe.parallel_experts`` as the cost model sees it.

    Args:
        op: The layer.
        place: :data:`FORWARD` or :data:`BACKWARD`.
        ctx: Where the cost model and the profile are.
        tokens: Tokens of a rank, spread evenly over the experts, where the profile does not know the layer.

    Raises:
        Whole: Something is not known; with what would help.
    """
    attr = op_def(op.name).attr
    sizes, group = attr(op, "sizes"), attr(op, "group")
    sent = traffic(op.regions[place])
    if sent is None:
        raise Whole(f"what the form {attr(op, 'form')!r} sends is not predicted; ask for a number of chunks")
    if not isinstance(ctx.cost_model, OverlapCosts):
        raise Whole("there is no cost model; ask for a number of chunks")
    links, times = ctx.cost_model.transport(group, len(sizes)), ctx.cost_model.expert_times(op, place == BACKWARD)
    if links is None:
        raise Whole(f"nobody measured the links of group {group!r}; ask for a number of chunks")
    if times is None:
        raise Whole("the cost model does not know its experts; ask for a number of chunks")
    rows = read_rows(op, ctx, tokens)
    most = max(map(sum, rows))
    top_k = choices(op)
    home = {"experts": most * sent.back_bytes, "tokens": most / top_k * sent.back_bytes}
    costs = ctx.cost_model
    if place == BACKWARD and not (isinstance(costs, GradientCosts) and costs.in_place(op)):
        home["experts"] += _weight_bytes(op)
    return Layer(
        rows, sizes, times, links, sent.there_bytes, sent.back_bytes, sent.there_messages, sent.back_messages,
        joining={along: costs.copying(group, size) for along, size in home.items()},
        chunk_s={along: costs.chunk_seconds(op, place, along) for along in home},
        front_s={a: costs.front_seconds(op, place, a) for a in home} if isinstance(costs, FrontCosts) else {},
        burden=costs.burden(group),
    )  # fmt: skip


def read_rows(op: Op, ctx: PassContext, tokens: int = 0) -> Sequence[Sequence[float]]:
    """Rows that every rank sends to every expert, [N][E], as the profile says or spread evenly.

    Args:
        op: A ``moe.parallel_experts``.
        ctx: Where the profile is.
        tokens: Of a rank, where the profile does not know the layer.

    Raises:
        Whole: Nobody says how many.
    """
    sizes, experts = op_def(op.name).attr(op, "sizes"), op_def(op.name).attr(op, "experts")
    rows = ctx.profile.rows(op.loc.module, len(sizes), experts) if isinstance(ctx.profile, RoutingLoads) else None
    if rows is None:
        if not tokens:
            raise Whole("there is no routing profile; the option tokens says how many a step has")
        rows = [[tokens * choices(op) / experts] * experts] * len(sizes)
    return rows


def choices(op: Op) -> int:
    """Experts of a token, k."""
    return int(_tensor(op, 1).shape[1])


def _weight_bytes(op: Op) -> float:
    """Bytes of a rank's weights, whose gradients are put together from those of every chunk's experts."""
    types = [v.type for v in (*op.group("up"), *op.group("down")) if isinstance(v.type, TensorType)]
    known = [t for t in types if all(d.is_Integer for d in t.shape)]
    return sum(math.prod(int(d) for d in t.shape) * t.dtype.bits / 8 for t in known)


def read_beside(op: Op, place: int, rows: Sequence[Sequence[float]], ctx: PassContext) -> Beside | None:
    """What is computed beside one direction of a layer; None where the cost model does not know how long it takes.

    Args:
        op: The layer.
        place: :data:`FORWARD` or :data:`BACKWARD`.
        rows: What :func:`read_rows` says.
        ctx: Where the cost model is.
    """
    experts, costs = beside_experts(op.regions[FORWARD]), ctx.cost_model
    if not experts or not isinstance(costs, BesideCosts):
        return None
    times = [costs.layer_times(inner, op.attrs["group"], place == BACKWARD) for inner in experts]
    known = tuple(t for t in times if t is not None)
    tokens = tuple(sum(row) / choices(op) for row in rows)
    return Beside(known, tokens, place == BACKWARD) if len(known) == len(times) else None


def plan_filled(layer: Layer, place: int, policy: str, rank_known: bool, beside: Beside) -> Filled:
    """As :func:`plan`, with places for what is computed beside the layer."""
    if policy == "auto":
        return auto_filled(layer, allowed(place, rank_known), beside)
    return fill(plan(layer, place, policy, rank_known), beside)


def _tensor(op: Op, place: int) -> TensorType:
    found = op.operands[place].type
    assert isinstance(found, TensorType)
    return found


def allowed(place: int, rank_known: bool = False) -> tuple[str, ...]:
    """What may be cut: of a backward experts alone, since gradients of weights would be added up in another order.

    Where the rank is known that the program is for, its own rows may come first, and its experts be in an order of
    their own.
    """
    forward = ("experts", "tokens", "own", "order") if rank_known else ("experts", "tokens")
    return forward if place == FORWARD else tuple(a for a in forward if a in ("experts", "order"))


def plan(layer: Layer, place: int, policy: str = "auto", rank_known: bool = False) -> Schedule:
    """The schedule of a policy, along what may be cut; arguments as for :func:`allowed`."""
    found = choose(policy, layer, allowed(place, rank_known))
    if found.along in allowed(place):
        return found
    return schedule(layer, "experts", (1,) * min(len(found.sizes), max(layer.sizes)))
