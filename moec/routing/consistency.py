"""Local routing consistency: do neighbouring tokens of a sequence choose the same experts? (arXiv:2505.16056)

A segment is ``m`` tokens of one sequence that follow each other, and ``c[s, e]`` the tokens of segment s that chose
expert e. Sequences are cut into segments from their beginning; what is left at their end is left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]


def segment_counts(ids: Ids, experts: int, length: int) -> npt.NDArray[np.int64]:
    """``c``, i64[segments, E].

    Args:
        ids: int[sequences, tokens, k], the experts that every token chose, all different.
        experts: E.
        length: m.
    """
    sequences, tokens, top_k = ids.shape
    each = tokens // length
    cut = ids[:, : each * length].reshape(sequences * each, length * top_k).astype(np.int64)
    flat = cut + np.arange(len(cut))[:, None] * experts
    return np.bincount(flat.reshape(-1), minlength=len(cut) * experts).reshape(len(cut), experts)


def best_performance(ids: Ids, experts: int, length: int) -> tuple[float, float]:
    """Segment routing best performance ``SRP(m)``, and the size of the group of experts at which it is reached.

    ``SRP(m) = max over θ of 2 Σ_{c >= θ} c / (m #{c >= θ} + Σ c)``: how well "every token of the segment goes to every
    expert of the segment's group" says where tokens go (the F1 score), if the groups are those of the experts that
    get θ tokens or more of the segment, and θ is the best for all segments together.

    Returns:
        ``(SRP, ρ)`` with ``ρ = m #{c >= θ*} / Σ c``, the group's size over that of a token's experts. ``(0, 0)`` where
        no sequence is as long as a segment.
    """
    counts = segment_counts(ids, experts, length)
    total = int(counts.sum())
    if not total:
        return 0.0, 0.0
    pairs = np.bincount(counts.reshape(-1), minlength=length + 1)
    members = pairs[::-1].cumsum()[::-1][1:]  # by θ = 1 .. m
    hits = (pairs * np.arange(len(pairs)))[::-1].cumsum()[::-1][1:]
    scores = 2 * hits / (length * members + total)
    best = int(scores.argmax())
    return float(scores[best]), float(length * members[best] / total)


def hit_rates(ids: Ids, experts: int, ahead: int | None) -> npt.NDArray[np.float64]:
    """Segment cache best hit rate ``SCH(m, C)`` for every cache of C = 1 .. E experts, f64[E].

    The cache holds whole experts, starts empty in every sequence, and gets a token's experts one after the other. Of
    two experts it keeps the one that more of the next m tokens chose, then the one used later: a stack algorithm
    (Mattson et al., IBM Systems Journal 9(2), 1970), so one run gives the hits of all sizes.

    Args:
        ids: int[sequences, tokens, k].
        experts: E.
        ahead: m; None for all tokens that follow.
    """
    sequences, tokens, top_k = ids.shape
    if not ids.size:
        return np.zeros(experts)
    chosen = np.zeros((sequences, tokens + 1, experts), np.int64)
    np.put_along_axis(chosen[:, 1:], ids.astype(np.int64), 1, axis=2)
    until = chosen.cumsum(axis=1)  # [s, t, e]: tokens before t that chose e
    last = np.minimum(np.arange(tokens) + 1 + (tokens if ahead is None else ahead), tokens)
    wanted = until[:, last] - until[:, np.arange(tokens) + 1]
    lines = np.arange(sequences)
    used = np.full((sequences, experts), -1)
    stack = np.tile(np.arange(experts), (sequences, 1))
    depths = np.zeros(experts + 1, np.int64)
    place = np.arange(experts)
    for t in range(tokens):
        for j in range(top_k):
            expert = ids[:, t, j]
            # Priorities are all different: the next tokens' choices, then when an expert was used. Those that were
            # never used stand for empty places.
            rank = (wanted[:, t] * (tokens * top_k + 1) + used) * experts + place
            rank = np.where(used < 0, place - experts, rank)
            at = (stack == expert[:, None]).argmax(axis=1)
            depths += np.bincount(np.where(used[lines, expert] < 0, experts, at), minlength=experts + 1)
            # What each place pushes down is the least of all above it; what it keeps is the better of the two.
            keys = np.take_along_axis(rank, stack, axis=1)
            pushed = np.minimum.accumulate(keys, axis=1)
            kept = np.concatenate([keys[:, :1], np.maximum(pushed[:, :-1], keys[:, 1:])], axis=1)
            down = np.concatenate([keys[:, :1], pushed[:, :-1]], axis=1)
            middle, end = place < at[:, None], place == at[:, None]
            moved = np.where(middle, kept, np.where(end, down, keys)) % experts
            stack = np.where(place == 0, expert[:, None], moved)
            used[lines, expert] = t * top_k + j
    return depths[:experts].cumsum() / ids.size
