"""SRP and SCH against their definitions, written as loops; SCH between LRU and Belady's cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from moec.routing.consistency import best_performance, hit_rates, segment_counts

Ids = npt.NDArray[np.int64]
EXACT = 1e-12
"""Both sides are the same quotients of whole numbers, rounded in another order."""


def trace(seed: int, sequences: int, tokens: int, experts: int, top_k: int, flat: float = 0.6) -> Ids:
    """Random tokens of a skewed router, int[sequences, tokens, k]."""
    draw = np.random.default_rng(seed)
    chance = draw.dirichlet(np.full(experts, flat)) + 1e-3
    chance /= chance.sum()
    return np.array(
        [[draw.choice(experts, top_k, replace=False, p=chance) for _ in range(tokens)] for _ in range(sequences)]
    )


def srp(ids: Ids, experts: int, m: int) -> float:
    """The F1 of "every token of a segment goes to every expert of its group", over all thresholds of groups."""
    best = 0.0
    for theta in range(1, m + 1):
        right = said = there = 0
        for sequence in ids:
            for start in range(0, len(sequence) - m + 1, m):
                segment = sequence[start : start + m]
                for e in range(experts):
                    c = sum(int(e in token) for token in segment)
                    there += c
                    if c >= theta:
                        right, said = right + c, said + m
        if right:
            precision, recall = right / said, right / there
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def cached(sequence: Ids, size: int, worst: str, m: int | None = None) -> int:
    """Hits of a cache of ``size`` experts that evicts by ``worst``: ``schedule``, ``lru`` or ``belady``."""
    flat, k = [int(e) for e in sequence.reshape(-1)], sequence.shape[1]
    cache: list[int] = []
    used: dict[int, int] = {}
    hits = 0
    for i, e in enumerate(flat):
        if e in cache:
            hits += 1
        else:
            ahead = sequence[i // k + 1 :] if m is None else sequence[i // k + 1 : i // k + 1 + m]
            rank = {
                "schedule": lambda f, ahead=ahead: (sum(int(f in token) for token in ahead), used[f]),
                "lru": lambda f: used[f],
                "belady": lambda f, i=i: -next((j for j in range(i + 1, len(flat)) if flat[j] == f), len(flat)),
            }[worst]
            if len(cache) == size:
                cache.remove(min(cache, key=rank))  # type: ignore[arg-type]
            cache.append(e)
        used[e] = i
    return hits


@pytest.mark.parametrize("m", [1, 2, 5, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_srp_is_its_definition(m: int, seed: int) -> None:
    ids = trace(seed, 2, 20, 7, 2)
    found, size = best_performance(ids, 7, m)
    assert abs(found - srp(ids, 7, m)) <= EXACT
    assert 0 < size <= 7 / 2 + EXACT


def test_srp_of_tokens_that_always_choose_the_same_is_1() -> None:
    ids = np.tile(np.array([3, 1]), (2, 12, 1))
    assert best_performance(ids, 7, 4) == (1.0, 1.0)


def test_segments_stay_inside_sequences_and_none_is_longer() -> None:
    ids = trace(3, 3, 10, 5, 2)
    assert segment_counts(ids, 5, 4).shape == (6, 5)
    assert segment_counts(ids, 5, 4)[1].sum() == 8
    assert best_performance(ids, 5, 11) == (0.0, 0.0)


@pytest.mark.parametrize("m", [1, 4, None])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sch_is_its_definition_for_every_cache(m: int | None, seed: int) -> None:
    ids = trace(seed, 2, 24, 6, 2)
    found = hit_rates(ids, 6, m)
    for size in range(1, 7):
        want = sum(cached(s, size, "schedule", m) for s in ids) / ids.size
        assert abs(found[size - 1] - want) <= EXACT, size


@pytest.mark.parametrize("seed", range(4))
def test_sch_of_all_that_follows_lies_between_lru_and_belady(seed: int) -> None:
    """The upper bound is a theorem; the lower one holds for routers that do not drift, as these."""
    ids = trace(seed, 3, 40, 8, 2)
    found = hit_rates(ids, 8, None)
    for size in range(1, 9):
        least, most = (sum(cached(s, size, name) for s in ids) / ids.size for name in ("lru", "belady"))
        assert least - EXACT <= found[size - 1] <= most + EXACT, size


def test_a_cache_of_all_misses_each_expert_once() -> None:
    ids = trace(5, 2, 30, 6, 2)
    first = sum(len(np.unique(s)) for s in ids)
    assert abs(hit_rates(ids, 6, 4)[-1] - (1 - first / ids.size)) <= EXACT
    assert hit_rates(ids[:, :0], 6, 4).tolist() == [0.0] * 6
