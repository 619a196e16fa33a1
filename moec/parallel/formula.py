"""How many bytes a layer's forward sends, by formula: what the counters of a run must show, to the byte.

Notation: H width of a token, N ranks, G nodes, k choices a token, b bytes an element. A rank's own rows do not count.

| form | there; back it is H b a slot for all of them |
|---|---|
| flat | 8 bytes for every expert elsewhere; H b for every slot whose expert is elsewhere |
| fixed | (H b + 4) for every slot whose expert is elsewhere |
| hierarchical, between nodes | 8 (G - 1); (H b + 4 k) for every other node that holds an expert of a token |
| hierarchical, inside a node | 8 bytes for every expert elsewhere in the node; H b for every slot elsewhere in it |
| gather | (N - 1) (8 + T (H b + 4 k)) |

Slots of no expert (sentinels, zero-compute experts that were eliminated) are in none of these but gather's ids.

Ranks of a ``tp`` group, P of them, have T tokens in common; rank r has t_r of them in a layer with experts:

| where | sends |
|---|---|
| attention, in the forward and in the backward | H b (T - t_r) to be summed, H b (P - 1) t_r |
| experts' results, in the forward | H b (P - 1) t_r |
| gradients of experts' tokens and of k weights, in the backward | (H b + w k) (P - 1) t_r |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from moec.ir.parallel_semantics import even_sizes, owners

COUNT, ID = 8, 4
"""Bytes of a count, and of an expert's id."""


def layer_bytes(
    ids: Sequence[Tensor],
    sizes: Sequence[int],
    row: int,
    form: str = "flat",
    *,
    nodes: int = 1,
    back: int | None = None,
) -> list[Counter[str]]:
    """Bytes that every rank sends in the forward of one layer, by group (``""``, ``".node"``, ``".local"``).

    Args:
        ids: The chosen experts of every rank's tokens, int[T, k] each.
        sizes: Experts of every rank.
        row: Bytes of a token's row, H b.
        form: As ``moe.parallel_experts`` has it.
        nodes: G, for the hierarchical form.
        back: Bytes of an expert's row, if others than ``row``.
    """
    back = row if back is None else back
    home = [owners(t, sizes) for t in ids]
    ranks, top_k = len(sizes), ids[0].shape[1]
    # slots[s][r]: slots of rank s whose expert is on rank r
    slots = [[int((h == r).sum()) for r in range(ranks)] for h in home]
    found: list[Counter[str]] = [Counter() for _ in range(ranks)]
    for r in range(ranks):
        there, came = sum(slots[r]) - slots[r][r], sum(s[r] for s in slots) - slots[r][r]
        if form == "flat":
            found[r][""] = COUNT * (sum(sizes) - sizes[r]) + row * there + back * came
        elif form == "fixed":
            found[r][""] = (row + ID) * there + back * came
        elif form == "gather":
            found[r][""] = (ranks - 1) * (COUNT + len(ids[r]) * (row + ID * top_k)) + back * came
        else:
            found[r] = _hierarchical(home, sizes, r, row, back, nodes, top_k)
    return found


def _hierarchical(
    home: Sequence[Tensor], sizes: Sequence[int], me: int, row: int, back: int, nodes: int, top_k: int
) -> Counter[str]:
    each = len(sizes) // nodes
    node, place = divmod(me, each)
    others = [n for n in range(nodes) if n != node]
    copies = sum(int((home[me] // each == n).any(dim=1).sum()) for n in others)
    # Tokens that reach the node by this rank: those of the ranks of the same place on all nodes.
    mine = [home[n * each + place] for n in range(nodes)]
    returned = sum(int((mine[n] // each == node).sum()) for n in others)
    by_here = torch.cat([h.flatten() for h in mine])
    spread = int(((by_here // each == node) & (by_here != me)).sum())
    made = sum(int((h == me).sum()) for s, h in enumerate(home) if s % each != place)
    experts = sum(sizes[node * each : (node + 1) * each])
    return Counter(
        {
            ".node": COUNT * (nodes - 1) + copies * (row + ID * top_k) + back * returned,
            ".local": COUNT * (experts - sizes[me]) + row * spread + back * made,
        }
    )


def tensor_parallel_bytes(tokens: int, ranks: int, rank: int, row: int) -> Counter[str]:
    """Bytes that a rank of a ``tp`` group sends in the forward of one attention and one layer with experts.

    Args:
        tokens: T, those of the group.
        ranks: P.
        rank: r.
        row: H b.
    """
    own = even_sizes(tokens, ranks)[rank]
    gathered = (ranks - 1) * own * row
    return Counter({"reduce_scatter": (tokens - own) * row, "attention": gathered, "experts": gathered})


def expected_bytes(
    tokens: float, top_k: int, ranks: int, row: float, form: str = "flat", nodes: int = 1, sums: bool = False
) -> float:
    """Bytes of rows that a rank sends in a layer's forward where every expert is chosen equally often.

    Args:
        tokens: T of a rank.
        top_k: k.
        ranks: N.
        row: Bytes of a row, there and back.
        form: ``flat``, ``gather`` or ``hierarchical``.
        nodes: G.
        sums: Rows are added up on their way home.
    """
    slots = tokens * top_k * (ranks - 1) / ranks
    if form == "flat":
        return 2 * slots * row
    everyone = tokens * (ranks - 1)
    if form == "gather":
        return (everyone + (everyone if sums else slots)) * row
    each = ranks // nodes
    copies = tokens * (nodes - 1) * (1 - (1 - 1 / nodes) ** top_k)  # P08: n (1 - (1 - 1/n)^k) nodes a token
    between = tokens * top_k * (nodes - 1) / nodes
    inside = tokens * top_k * (each - 1) / each
    return (copies + (copies if sums else between) + 2 * inside) * row
