"""How slots are spread over ranks, in plain torch: the index arithmetic of expert parallelism.

Experts lie in order: rank 0 holds the first ``sizes[0]``, rank 1 the next ``sizes[1]``, and so on. Some may hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moec.ir.errors import MoecError
from moec.ir.moe_semantics import Plan, make_plan


def edges(sizes: Sequence[int]) -> list[int]:
    """``[0, sizes[0], sizes[0] + sizes[1], ...]``: where every rank's experts begin, and the end."""
    return [0, *accumulate(sizes)]


def chunk_sizes(total: int, parts: int) -> tuple[int, ...]:
    """How ``torch.chunk`` (and DTensor's ``Shard(0)``) deals ``total`` out to ``parts``: (2, 2, 1, 0) for 5 to 4."""
    if parts < 1:
        raise MoecError(f"{total} experts cannot be dealt out to {parts} ranks")
    each = -(-total // parts)
    return tuple(max(0, min(each, total - i * each)) for i in range(parts))


def even_sizes(total: int, parts: int) -> tuple[int, ...]:
    """``total`` rows dealt out so that no part has two more than another: (1, 1, 1, 2) for 5 to 4."""
    return tuple(total * (i + 1) // parts - total * i // parts for i in range(parts))


def owners(ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rank that holds every id; ``len(sizes)`` for ids of no expert. i64, of the shape of ``ids``."""
    flat = ids.to(torch.int64).contiguous()
    ends = torch.tensor(edges(sizes)[1:], dtype=torch.int64, device=ids.device)
    found = torch.bucketize(flat, ends, right=True)
    return torch.where((flat < 0) | (flat >= sum(sizes)), len(sizes), found)


def renumber(ids: Tensor, order: Sequence[int]) -> Tensor:
    """The place of every id in ``order``; ``len(order)`` for ids of no expert."""
    places = torch.full((len(order) + 1,), len(order), dtype=ids.dtype)
    places[list(order)] = torch.arange(len(order), dtype=ids.dtype)
    live = (ids >= 0) & (ids < len(order))
    return places.to(ids.device)[torch.where(live, ids, len(order)).to(torch.int64)]


def split_rows(rows: Tensor, counts: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Views of the rows of every chunk, whose sizes are sums of equal parts of ``counts`` (i64[K * N])."""
    sizes = counts.view(chunks, -1).sum(1).tolist()
    return rows[: sum(sizes)].split(sizes)


def loads(plan: Plan, sizes: Sequence[int], device: torch.device, order: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Rows for every expert (i64[E]) and for every part of the plan's experts (i64[N]).

    Args:
        plan: The plan.
        sizes: Experts of every part.
        device: Of the counts.
        order: The expert at every place, where the plan was made of places (:func:`renumber`).
    """
    if len(plan.counts) != sum(sizes):
        raise MoecError(f"a plan for {len(plan.counts)} experts cannot go to ranks that hold {sum(sizes)}")
    at = edges(sizes)
    by_rank = [sum(plan.counts[a:b]) for a, b in pairwise(at)]
    by_expert = torch.tensor(plan.counts, dtype=torch.int64, device=device)
    if order:
        by_expert = torch.empty_like(by_expert).index_copy_(0, torch.tensor(order, device=device), by_expert)
    return by_expert, torch.tensor(by_rank, dtype=torch.int64, device=device)


def arrivals(
    counts: Tensor, ranks: int, only: Sequence[int] = (), among: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Rows from every rank (i64[N]) and the own expert of every row that comes (i64[R, 1]).

    Args:
        counts: i64[N * E'], what every rank sends to each of this rank's E' experts.
        ranks: N.
        only: First and past-last of the experts whose rows come; ids count from the first. All, where it is empty.
        among: The experts whose rows come, in their order, by their own numbers; None for ``only``.
    """
    table = counts.view(ranks, -1)
    if among is None:
        table = table[:, only[0] : only[1]] if only else table
        own = torch.arange(table.shape[1], device=counts.device)
    else:
        own = torch.tensor(among, dtype=torch.int64, device=counts.device)
        table = table.index_select(1, own)
    ids = own.repeat(ranks).repeat_interleave(table.flatten())
    return table.sum(1), ids[:, None]


def reach(ids: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Plan]:
    """Which tokens go to which node, each once.

    Args:
        ids: int[T, k] chosen experts.
        sizes: Experts of every node.

    Returns:
        The token of every copy (i64[U], those for node 0 first, in order of tokens); the ids that each copy is sent
        for, counted from the node's first expert, -1 elsewhere (i64[U, k]); copies for every node (i64[G]); and the
        plan of all slots by node.
    """
    nodes, at = len(sizes), edges(sizes)
    home = owners(ids, sizes)
    tokens, each, counts = [], [], []
    for node in range(nodes):
        here = home == node
        chosen = here.any(dim=1).nonzero().flatten()
        tokens.append(chosen)
        each.append(torch.where(here, ids.to(torch.int64) - at[node], -1)[chosen])
        counts.append(len(chosen))
    plan = make_plan(home, nodes, sentinels=True)
    return torch.cat(tokens), torch.cat(each), torch.tensor(counts, dtype=torch.int64, device=ids.device), plan


def slot_rows(rows: Tensor, plan: Plan) -> Tensor:
    """Rows of the plan's live slots, in the order of the slots rather than of the experts."""
    live = sum(plan.counts)
    return rows[:live][torch.argsort(plan.order[:live])]


def segment_slots(ids: Tensor, counts: Tensor) -> Tensor:
    """How many ids >= 0 the copies from every rank hold (i64[G]).

    Args:
        ids: i64[U, k], the copies of rank 0 first.
        counts: i64[G], copies from every rank.
    """
    live = (ids >= 0).sum(1)
    rank = torch.arange(len(counts), device=ids.device).repeat_interleave(counts)
    return torch.zeros_like(counts).index_add(0, rank, live)


def sum_slots(rows: Tensor, plan: Plan) -> Tensor:
    """``y[t] = Σ_k rows[slot(t, k)]`` in order of k; slots of no expert add nothing."""
    live = sum(plan.counts)
    slots = rows.new_zeros((plan.tokens * plan.top_k, rows.shape[-1])).index_copy(0, plan.order[:live], rows[:live])
    return slots.view(plan.tokens, plan.top_k, rows.shape[-1]).sum(dim=1)


def place_slots(values: Tensor, plan: Plan) -> Tensor:
    """Values of live slots ([S, 1]) as [T, k]; 0 for slots of no expert."""
    live = sum(plan.counts)
    flat = values.new_zeros(plan.tokens * plan.top_k).index_copy(0, plan.order[:live], values[:live, 0])
    return flat.view(plan.tokens, plan.top_k)
