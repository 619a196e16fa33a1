"""Trying on recorded tokens what regrouping saves, and what it would save where tokens have nothing in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moec.ir.parallel_semantics import chunk_sizes, even_sizes, owners
from moec.ir.regroup import as_given, cost, incidence, regroup
from moec.routing.consistency import Ids
from moec.routing.profile import Clusters, Trial

TOKENS = (16, 32, 64, 128, 256)
WINDOWS = 32
FEWEST_WINDOWS = 8
"""Fewer say too little about how much they differ."""
_ROUNDS = 40


def shuffled(ids: Ids, draw: np.random.Generator) -> Ids:
    """The experts of ``ids`` (int[T, k]) dealt out anew: every expert as often as before, none twice to a token.

    Where that does not come out after some rounds (one expert of nearly all slots), a few tokens have one twice.
    """
    found = draw.permutation(ids.reshape(-1)).reshape(ids.shape)
    flat = found.reshape(-1)
    for _ in range(_ROUNDS):
        order = np.argsort(found, axis=1, kind="stable")
        ranked = np.take_along_axis(found, order, axis=1)
        twice = np.zeros(found.shape, bool)
        np.put_along_axis(twice, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
        slots = np.flatnonzero(twice.reshape(-1))
        if not len(slots):
            break
        for slot, other in zip(slots, draw.integers(0, flat.size, len(slots)), strict=True):
            flat[slot], flat[other] = flat[other], flat[slot]
    return found


def try_regrouping(
    ids: Ids, experts: int, batches: int = 2, ranks: int = 0, sizes: Sequence[int] = TOKENS, windows: int = WINDOWS
) -> Clusters:
    """Regroup neighbouring tokens of a trace.

    Args:
        ids: int[N, k], in the order in which the model saw its tokens.
        experts: E.
        batches: Micro-batches that share their tokens.
        ranks: Count the ranks that hold the experts, these many, instead of experts; 0 counts experts.
        sizes: Numbers of tokens, of all micro-batches together. Those that the trace holds too seldom are left out.
        windows: How often each is tried, at most; windows do not overlap.
    """
    trials = []
    for tokens in sizes:
        count = min(windows, len(ids) // tokens)
        if count < FEWEST_WINDOWS:
            continue
        draw = np.random.default_rng(tokens)
        starts = np.linspace(0, len(ids) - tokens, count).astype(int)
        parts = np.array(
            [
                [_saved(chosen, experts, batches, ranks) for chosen in (window, shuffled(window, draw))]
                for window in (ids[start : start + tokens] for start in starts)
            ]
        )
        saved, chance = parts.T
        spreads = (saved - chance).std(ddof=1), chance.std(ddof=1)
        trials.append(Trial(tokens, count, *map(float, (saved.mean(), chance.mean(), *spreads))))
    return Clusters(batches, ranks, tuple(trials))


def _saved(ids: Ids, experts: int, batches: int, ranks: int) -> float:
    """The part of the cost that regrouping saves."""
    if ranks:
        ids, experts = owners(torch.from_numpy(ids), chunk_sizes(experts, ranks)).numpy(), ranks
    chosen, sizes = incidence(ids, experts), even_sizes(len(ids), batches)
    before = cost(chosen, as_given(sizes))
    return 1 - cost(chosen, regroup(chosen, sizes)) / before if before else 0.0
