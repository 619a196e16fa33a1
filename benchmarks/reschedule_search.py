"""How good the compiled planner of ``moe.regroup`` is: against all partitions of few tokens, and against K-means.

    python benchmarks/reschedule_search.py best --tokens 16,18,20,22,24
    python benchmarks/reschedule_search.py k-means --tokens 64,128,200,256

Tokens have planted clusters, as in ``reschedule.py``; two batches of T / 2 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from moec.backends.registry import get_backend
from moec.ir.parser import parse_graph
from reschedule import PLAN, planted
from shapes import parse_tokens

Ids = npt.NDArray[np.int64]
FEW = ((16, 2, 2, 0.2), (32, 4, 2, 0.1), (64, 8, 2, 0.1), (60, 4, 3, 0.3), (16, 2, 4, 0.1), (64, 8, 8, 0.1))
"""Experts, experts a token, kinds of tokens, chance of an expert of any kind. At most 64 experts: bits of a word."""
MANY = ((128, 8, 2, 0.1), (128, 8, 8, 0.1), (128, 8, 4, 0.3), (128, 8, 1, 0.0), (128, 8, 16, 0.05))
ROUNDS = 30


def cost(ids: Ids, first: Sequence[int]) -> int:
    """Distinct experts of the tokens in ``first``, and of the others, added up."""
    inside = np.zeros(len(ids), bool)
    inside[list(first)] = True
    return len(np.unique(ids[inside])) + len(np.unique(ids[~inside]))


def ours(ids: Ids, experts: int) -> int:
    """The cost of what the cpu backend finds."""
    backend, half = get_backend("cpu"), len(ids) // 2
    kernel = backend.load(backend.lower(parse_graph(PLAN.format(experts=experts)), "cpu"))
    both = torch.from_numpy(ids)
    return cost(ids, kernel.forward([both[:half], both[half:]])[0].tolist())


def best(ids: Ids) -> int:
    """The least cost of all partitions."""
    words, members = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    for row in ids:
        bits = np.bitwise_or.reduce(np.uint64(1) << row.astype(np.uint64))
        words, members = np.concatenate([words, words | bits]), np.concatenate([members, members + 1])
    chosen = np.flatnonzero(members == len(ids) // 2)
    counts = np.bitwise_count(words[chosen]).astype(int) + np.bitwise_count(words[len(words) - 1 - chosen])
    return int(counts.min())


def k_means(ids: Ids, experts: int, draw: np.random.Generator) -> int:
    """The cost of two equal batches of Lloyd's rounds from two random tokens."""
    chosen = np.zeros((len(ids), experts), np.int64)
    chosen[np.arange(len(ids))[:, None], ids] = 1
    a, b = draw.choice(len(ids), 2, replace=False)
    weight, half = chosen[b] - chosen[a], len(ids) // 2
    order = np.arange(len(ids))
    for _ in range(ROUNDS + 1):
        order = np.argsort(chosen @ weight, kind="stable")
        weight = chosen[order[half:]].sum(0) * half - chosen[order[:half]].sum(0) * (len(ids) - half)
    return cost(ids, order[:half].tolist())


def main() -> None:
    """Reads the command line, tries, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=("best", "k-means"))
    parser.add_argument("--tokens", default="16,18,20,22,24", help="of both micro-batches together")
    parser.add_argument("--seeds", type=int, default=4, help="instances of each kind")
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    saved, found, other, worse, count = [], 0, 0, [], 0
    for tokens in parse_tokens(args.tokens):
        for experts, top_k, clusters, noise in FEW if args.against == "best" else MANY:
            for _ in range(args.seeds):
                ids = planted(draw, tokens, experts, top_k, clusters, noise).numpy()
                mine = ours(ids, experts)
                rival = best(ids) if args.against == "best" else k_means(ids, experts, draw)
                found, other, count = found + mine, other + rival, count + 1
                before = cost(ids, range(tokens // 2))
                if args.against == "best" and before > rival:
                    saved.append((before - mine) / (before - rival))
                if mine > rival:
                    worse.append(mine - rival)
    print(f"{count} instances, {found} experts against {other}; worse in {len(worse)}, by {sorted(worse)}")
    if saved:
        print(f"of what the best saves: {np.mean(saved):.2%} on average, {min(saved):.2%} at worst")


if __name__ == "__main__":
    main()
