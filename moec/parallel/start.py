"""The check at the start: all ranks mean the same mesh, plan and model, and hold the same replicated weights.

Ranks compare notes in torch.distributed's store, not in a collective: a rank that is missing or thinks of another group
would leave a collective hanging.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from moec.parallel.plan import ParallelError

_turns: Counter[tuple[int, ...]] = Counter()
"""How often this process has compared notes with each set of ranks."""


def compare(
    what: str, mine: Mapping[str, str], ranks: Iterable[int], seconds: float, aside: Iterable[str] = ()
) -> set[str]:
    """Hold what this rank says against what all others of ``ranks`` say.

    Args:
        what: What is compared, for messages; all ranks compare in the same order.
        mine: Facts by name.
        ranks: Global ranks that take part.
        seconds: How long to wait for them.
        aside: Words in which ranks may differ.

    Returns:
        The words of all of them.

    Raises:
        ParallelError: A rank does not come within the time, or says something else; it is named, and the fact.
    """
    store = dist.distributed_c10d._get_default_store()
    me, ranks = dist.get_rank(), list(ranks)
    turn, with_whom = _turns[tuple(ranks)], "-".join(map(str, ranks))
    _turns[tuple(ranks)] += 1

    def key(rank: int) -> str:
        return f"moec/start/{with_whom}/{turn}/{what}/{rank}"

    store.set(_last(me), f"its {what} with the ranks {ranks}")
    store.set(key(me), json.dumps([dict(mine), sorted(aside)]))
    others, words = {me: dict(mine)}, set(aside)
    for r in ranks:
        try:
            if r != me:
                store.wait([key(r)], timedelta(seconds=seconds))
                others[r], more = json.loads(store.get(key(r)))
                words.update(more)
        except (RuntimeError, dist.DistError) as error:
            raise ParallelError(
                f"rank {r} has not come to compare its {what} with the ranks {ranks} within {seconds:g} s{_instead(r)}",
                hint="all ranks of a mesh call moec.parallelize, in the same order; look at that rank's log",
            ) from error
    for name in dict.fromkeys(k for said in others.values() for k in said):
        values = {r: others[r].get(name, "nothing") for r in ranks}
        if len(set(values.values())) > 1:
            raise ParallelError(f"the ranks differ in their {what}: {_told(name, values)}", hint=_HINTS.get(what))
    return words


def _last(rank: int) -> str:
    return f"moec/start/last/{rank}"


def _instead(rank: int) -> str:
    """What the rank that did not come compared last, if anything."""
    store = dist.distributed_c10d._get_default_store()
    try:
        return f"; it last compared {store.get(_last(rank)).decode()}" if store.check([_last(rank)]) else ""
    except (RuntimeError, dist.DistError):
        return ""


_HINTS = {
    "mesh and plan": "give every rank the same mesh, plan and model",
    "replicated weights": "load one checkpoint on all ranks, or seed them alike: torch.manual_seed before the model",
}


def _told(name: str, values: Mapping[int, str]) -> str:
    """``"mesh is [0, 1] on rank 2, [[0], [1]] on the others"``: those in the minority are named."""
    common = Counter(values.values()).most_common(1)[0][0]
    odd = {r: v for r, v in values.items() if v != common}
    return f"{name} is " + ", ".join(f"{v} on rank {r}" for r, v in odd.items()) + f", {common} on the others"


def digest(tensor: torch.Tensor) -> str:
    """A hash of type, shape and bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=8)
    found.update(memoryview(flat.numpy()))  # type: ignore[arg-type]
    return found.hexdigest()
