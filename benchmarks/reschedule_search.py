"""How good the compiled planner of ``moe.regroup`` is: against all partitions of few tokens, and against K-means.

    python benchmarks/reschedule_search.py best --tokens 16,18,20,22,24
    python benchmarks/reschedule_search.py k-means --cases 2000

Two batches of T / 2 tokens. ``best`` takes tokens with planted clusters, as in ``reschedule.py``. ``k-means`` draws
layers of 8 to 128 experts, 1 to 8 a token, 32 to 1024 tokens of one to 16 kinds, some experts more popular than others,
some kinds larger; the rival is the best of 20 runs of K-means (``--starts``) from pairs of tokens of its own.
``--longer N`` is one more rival: the same search with N times the steps. ``--planner numpy`` tries the search of the
reference interpreter.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from moec.backends.cpu.regroup import CpuRegroup
from moec.backends.registry import get_backend
from moec.ir.parser import parse_graph
from moec.ir.regroup import incidence, regroup
from reschedule import PLAN, planted
from shapes import parse_tokens

Ids = npt.NDArray[np.int64]
FEW = ((16, 2, 2, 0.2), (32, 4, 2, 0.1), (64, 8, 2, 0.1), (60, 4, 3, 0.3), (16, 2, 4, 0.1), (64, 8, 8, 0.1))
"""Experts, experts a token, kinds of tokens, chance of an expert of any kind. At most 64 experts: bits of a word."""
ROUNDS = 60


def cost(ids: Ids, first: Sequence[int]) -> int:
    """Distinct experts of the tokens in ``first``, and of the others, added up."""
    inside = np.zeros(len(ids), bool)
    inside[list(first)] = True
    return len(np.unique(ids[inside])) + len(np.unique(ids[~inside]))


def ours(ids: Ids, experts: int, times: int = 1) -> int:
    """The cost of what the cpu backend finds, in so many times the steps that it takes otherwise."""
    backend, half = get_backend("cpu"), len(ids) // 2
    kernel = backend.load(backend.lower(parse_graph(PLAN.format(attrs=f"experts = {experts}")), "cpu"))
    assert isinstance(kernel, CpuRegroup)
    kernel.price *= times
    both = torch.from_numpy(ids)
    return cost(ids, kernel.forward([both[:half], both[half:]])[0].tolist())


def by_numpy(ids: Ids, experts: int) -> int:
    """The cost of what the reference interpreter finds."""
    half = len(ids) // 2
    return cost(ids, regroup(incidence(ids, experts), [half, len(ids) - half])[0].tolist())


def drawn(draw: np.random.Generator) -> tuple[Ids, int]:
    """Experts of the tokens of some layer, and how many there are."""
    experts = int(draw.choice([8, 16, 32, 64, 128]))
    top_k, kinds = min(int(draw.integers(1, 9)), experts), min(int(draw.choice([1, 2, 2, 3, 4, 8, 16])), experts)
    tokens = int(draw.choice([32, 48, 64, 96, 128, 200, 256, 384, 512, 768, 1024]))
    noise = float(draw.choice([0.02, 0.05, 0.1, 0.3, 0.6]))
    popular = draw.permutation((1.0 + np.arange(experts)) ** -float(draw.choice([0, 0, 0.5, 1.0, 1.5])))
    common = (1.0 + np.arange(kinds)) ** -float(draw.choice([0, 0, 0.7]))
    chance = np.empty((kinds, experts))
    for kind, pool in enumerate(np.array_split(draw.permutation(experts), kinds)):
        own = np.zeros(experts)
        own[pool] = popular[pool]
        chance[kind] = noise * popular / popular.sum() + (1 - noise) * own / own.sum()
    scores = np.log(chance[draw.choice(kinds, tokens, p=common / common.sum())]) + draw.gumbel(size=(tokens, experts))
    return np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k].astype(np.int64), experts


def best(ids: Ids) -> int:
    """The least cost of all partitions."""
    words, members = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    for row in ids:
        bits = np.bitwise_or.reduce(np.uint64(1) << row.astype(np.uint64))
        words, members = np.concatenate([words, words | bits]), np.concatenate([members, members + 1])
    chosen = np.flatnonzero(members == len(ids) // 2)
    counts = np.bitwise_count(words[chosen]).astype(int) + np.bitwise_count(words[len(words) - 1 - chosen])
    return int(counts.min())


def k_means(ids: Ids, experts: int, starts: int, draw: np.random.Generator) -> int:
    """The least cost of two equal batches of Lloyd's rounds, of those from each of some pairs of random tokens."""
    chosen = np.zeros((len(ids), experts), np.float64)  # whole numbers below 2^53
    chosen[np.arange(len(ids))[:, None], ids] = 1
    half, least = len(ids) // 2, 2 * experts
    for _ in range(starts):
        a, b = draw.choice(len(ids), 2, replace=False)
        weight, before = chosen[b] - chosen[a], None
        for _ in range(ROUNDS):
            order = np.argsort(chosen @ weight, kind="stable")
            one = chosen[order[:half]].sum(0)
            other = chosen[order[half:]].sum(0)
            least = min(least, np.count_nonzero(one) + np.count_nonzero(other))
            weight = other * half - one * (len(ids) - half)
            if before is not None and (weight == before).all():
                break
            before = weight
    return least


def against_best(args: argparse.Namespace, draw: np.random.Generator) -> None:
    """Few tokens, whose partitions can all be tried."""
    saved, worse = [], 0
    for tokens in parse_tokens(args.tokens):
        for experts, top_k, clusters, noise in FEW:
            for _ in range(args.seeds):
                ids = planted(draw, tokens, experts, top_k, clusters, noise).numpy()
                mine, least, before = ours(ids, experts), best(ids), cost(ids, range(tokens // 2))
                worse += mine > least
                if before > least:
                    saved.append((before - mine) / (before - least))
    print(f"{len(saved)} instances with something to save; not the best in {worse}")
    print(f"of what the best saves: {np.mean(saved):.2%} on average, {min(saved):.2%} at worst")


def against_k_means(args: argparse.Namespace, draw: np.random.Generator) -> None:
    """Layers at random."""
    rivals = ("K-means", f"{args.longer} times the steps")[: 2 if args.longer else 1]
    found, sums = 0, dict.fromkeys(rivals, 0)
    over: dict[str, list[int]] = {name: [] for name in rivals}
    for _ in range(args.cases):
        ids, experts = drawn(draw)
        mine = by_numpy(ids, experts) if args.planner == "numpy" else ours(ids, experts)
        found += mine
        costs = [k_means(ids, experts, args.starts, draw), *([ours(ids, experts, args.longer)] if args.longer else [])]
        for name, rival in zip(rivals, costs, strict=True):
            sums[name] += rival
            over[name].append(mine - rival)
    for name, gaps in over.items():
        worse = sorted(g for g in gaps if g > 0)
        better, equal = sum(g < 0 for g in gaps), gaps.count(0)
        print(f"{args.cases} instances, {found} experts against {sums[name]} of {name}")
        print(f"better in {better}, equal in {equal}, worse in {len(worse)}, by {dict(Counter(worse))}")


def main() -> None:
    """Reads the command line, tries, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", choices=("best", "k-means"))
    parser.add_argument("--tokens", default="16,18,20,22,24", help="of both micro-batches together")
    parser.add_argument("--seeds", type=int, default=4, help="instances of each kind, against the best")
    parser.add_argument("--cases", type=int, default=2000, help="against K-means")
    parser.add_argument("--starts", type=int, default=20, help="of K-means, whose best counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longer", type=int, default=0, metavar="N")
    parser.add_argument("--planner", choices=("cpu", "numpy"), default="cpu")
    args = parser.parse_args()
    (against_best if args.against == "best" else against_k_means)(args, np.random.default_rng(args.seed))


if __name__ == "__main__":
    main()
