"""Ranks as threads of one process: runs a graph with collectives without any process group.

Collectives only index and concatenate tensors of other threads, so torch's autograd differentiates through them: the
gradients of a sum of all ranks' losses are an oracle for whatever a distributed backward does.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from moec.backends.reference.interpreter import run_graph
from moec.ir.comm_semantics import Call, CommError, Pending, World, running_in
from moec.ir.core import Graph

_T = TypeVar("_T")
PATIENCE = 60.0
"""Seconds a rank waits for the others before the run is given up."""

Groups = Mapping[str, Sequence[Sequence[int]]]
"""Every group's name, and the ranks of its instances: ``{"ep": [[0, 1, 2, 3]], "ep.node": [[0, 2], [1, 3]]}``."""


@dataclass
class _Meeting:
    """Where the ranks of one group instance lay down what they send."""

    barrier: threading.Barrier
    posts: dict[int, tuple[Call, Tensor]] = field(default_factory=dict)


class LocalWorld(World):
    """One rank's view of a world of threads.

    Attributes:
        sent: Bytes sent to other ranks by (kind, group), of this rank.
    """

    def __init__(self, me: int, groups: Groups, meetings: Mapping[tuple[int, ...], _Meeting]) -> None:
        self.me, self.groups, self.meetings = me, groups, meetings
        self.sent: Counter[tuple[str, str]] = Counter()

    def _ranks(self, group: str) -> tuple[int, ...]:
        for ranks in self.groups.get(group, ()):
            if self.me in ranks:
                return tuple(ranks)
        raise CommError(f"rank {self.me} is in no group {group!r}; there are {sorted(self.groups)}")

    def size(self, group: str) -> int:
        return len(self._ranks(group))

    def rank(self, group: str) -> int:
        return self._ranks(group).index(self.me)

    def start(self, call: Call, tensor: Tensor) -> Pending:
        ranks = self._ranks(call.group)
        meeting, at = self.meetings[ranks], ranks.index(self.me)
        self.sent[call.kind, call.group] += call.bytes_sent(tensor, at, len(ranks))
        meeting.posts[self.me] = call, tensor
        try:
            meeting.barrier.wait()
            posts = [meeting.posts[r] for r in ranks]
            meeting.barrier.wait()  # nobody posts the next one before all have read this one
        except threading.BrokenBarrierError:
            raise CommError(f"rank {self.me}: another rank left during {call.kind} over {call.group!r}") from None
        result = _result(at, posts)
        return Pending(lambda: result)


def _result(me: int, posts: Sequence[tuple[Call, Tensor]]) -> Tensor:
    """What rank ``me`` of the group gets.

    Raises:
        CommError: The ranks are in different collectives, or do not agree on sizes.
    """
    mine = posts[me][0]
    kinds = {call.kind for call, _ in posts}
    if len(kinds) > 1:
        raise CommError(f"group {mine.group!r}: the ranks are in different collectives: {', '.join(sorted(kinds))}")
    if mine.kind == "all_reduce":
        return torch.stack([t for _, t in posts]).sum(0)
    if mine.kind == "all_gather":
        parts = [t for _, t in posts]
    else:
        parts = [t[sum(c.send[:me]) : sum(c.send[: me + 1])] for c, t in posts]
    if mine.kind == "reduce_scatter":
        return torch.stack(parts).sum(0)
    got = tuple(len(p) for p in parts)
    if got != mine.recv:
        raise CommError(f"{mine.kind} over {mine.group!r}: rank {me} of it expects {mine.recv} rows, {got} came")
    return torch.cat(parts)


def run_world(size: int, groups: Groups, run: Callable[[int], _T]) -> tuple[list[_T], list[LocalWorld]]:
    """Run ``run(rank)`` as every rank of a world of threads.

    Args:
        size: Number of ranks.
        groups: Their groups; ``{"ep": [[0, ..., size-1]]}`` is one of all.
        run: What a rank does; its graphs find their world by themselves.

    Returns:
        What every rank gave, and its world (with the bytes it sent).

    Raises:
        Exception: The first error of any rank, by number of the rank, those before those that only lost a partner.
    """
    instances = {tuple(ranks) for each in groups.values() for ranks in each}
    meetings = {ranks: _Meeting(threading.Barrier(len(ranks), timeout=PATIENCE)) for ranks in instances}
    worlds = [LocalWorld(rank, groups, meetings) for rank in range(size)]
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size
    grad = torch.is_grad_enabled()

    def main(rank: int) -> None:
        try:
            with torch.set_grad_enabled(grad), running_in(worlds[rank]):
                results[rank] = run(rank)
        except BaseException as error:  # noqa: BLE001  (handed on to the caller, who sees it in the main thread)
            errors[rank] = error
            for meeting in meetings.values():
                meeting.barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [e for e in errors if e is not None]
    if raised:
        raise next((e for e in raised if "another rank left" not in str(e)), raised[0])
    return results, worlds


def run_ranks(graphs: Sequence[Graph], inputs: Sequence[Sequence[Any]], groups: Groups) -> list[list[Any]]:
    """Execute one graph a rank in lock-step; the outputs of every rank.

    Args:
        graphs: A graph for every rank; they may differ in sizes.
        inputs: The arguments of every rank's graph.
        groups: As in :func:`run_world`.
    """
    return run_world(len(graphs), groups, lambda rank: run_graph(graphs[rank], inputs[rank]))[0]
