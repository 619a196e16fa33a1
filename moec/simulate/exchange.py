"""What ranks give each other while their programs are traced: sizes for all, numbers where they are integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.ir.comm_semantics import Call, CommError, Pending, World
from moec.simulate.abstract import META, known
from moec.simulate.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from moec.simulate.steps import Collective, Flow
from moec.simulate.topology import Topology

Groups = Mapping[str, Sequence[Sequence[int]]]
"""Every group's name, and the ranks of its instances."""


@dataclass
class Meeting:
    """One collective of one group: what its ranks have posted so far, and what each gets once all have."""

    number: int
    ranks: tuple[int, ...]
    posts: dict[int, tuple[Call, Tensor]] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.posts) == len(self.ranks)


class Promise(Pending):
    """A started collective of one rank."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(lambda: meeting.results[rank])
        self.meeting = meeting


class Exchange:
    """All collectives of all ranks, in the order in which their first rank came.

    Attributes:
        collectives: Their messages, once they are complete.
        sent: Bytes that every rank sent to others, by (kind, group), as its program sees it.
    """

    def __init__(self, topology: Topology, groups: Groups) -> None:
        self.topology, self.groups = topology, groups
        self.collectives: list[Collective | None] = []
        self.sent: list[dict[tuple[str, str], int]] = [{} for _ in range(topology.ranks)]
        self._open: dict[tuple[str, tuple[int, ...]], list[Meeting]] = {}

    def ranks(self, me: int, group: str) -> tuple[int, ...]:
        """The ranks of ``me``'s instance of a group.

        Raises:
            CommError: It is in none.
        """
        for ranks in self.groups.get(group, ()):
            if me in ranks:
                return tuple(ranks)
        raise CommError(f"rank {me} is in no group {group!r}; there are {sorted(self.groups)}")

    def post(self, me: int, call: Call, tensor: Tensor) -> Promise:
        """Rank ``me`` starts its next collective of that group."""
        ranks = self.ranks(me, call.group)
        queue = self._open.setdefault((call.group, ranks), [])
        meeting = next((m for m in queue if me not in m.posts), None)
        if meeting is None:
            meeting = Meeting(len(self.collectives), ranks)
            self.collectives.append(None)
            queue.append(meeting)
        meeting.posts[me] = call, tensor
        bytes = call.bytes_sent(tensor, ranks.index(me), len(ranks))
        key = call.kind, call.group
        self.sent[me][key] = self.sent[me].get(key, 0) + bytes
        if meeting.complete:
            queue.remove(meeting)
            self._settle(meeting)
        return Promise(meeting, me)

    def _settle(self, meeting: Meeting) -> None:
        posts = [meeting.posts[r] for r in meeting.ranks]
        call, tensor = posts[0]
        kinds = {c.kind for c, _ in posts}
        if len(kinds) > 1:
            raise CommError(f"group {call.group!r}: the ranks are in different collectives: {', '.join(sorted(kinds))}")
        results = _RESULTS[call.kind](call.group, posts)
        meeting.results = dict(zip(meeting.ranks, results, strict=True))
        count = len(meeting.ranks)
        sent = {r: c.bytes_sent(t, i, count) for i, (r, (c, t)) in enumerate(zip(meeting.ranks, posts, strict=True))}
        row = "x".join(["R", *map(str, tensor.shape[1:])])
        label = f"{call.kind} {str(tensor.dtype).removeprefix('torch.')}[{row}]"
        flows = tuple(self._flows(meeting, call.kind, posts))
        self.collectives[meeting.number] = Collective(label, call.group, meeting.ranks, flows, sent)

    def _flows(self, meeting: Meeting, kind: str, posts: Sequence[tuple[Call, Tensor]]) -> list[Flow]:
        rows = [_row_bytes(t) for _, t in posts]
        if kind == "all_gather":
            return all_gather(meeting.ranks, [t.numel() * t.element_size() for _, t in posts], self.topology)
        if kind == "all_reduce":
            return all_reduce(meeting.ranks, posts[0][1].numel() * posts[0][1].element_size(), self.topology)
        if kind == "reduce_scatter":
            return reduce_scatter(meeting.ranks, [n * max(rows) for n in posts[0][0].send], self.topology)
        matrix = [[n * row for n in call.send] for row, (call, _) in zip(rows, posts, strict=True)]
        return all_to_all(meeting.ranks, matrix)


class RankWorld(World):
    """One rank's view of the exchange, which ops find by ``current_world``."""

    def __init__(self, me: int, exchange: Exchange) -> None:
        self.me, self.exchange = me, exchange

    def size(self, group: str) -> int:
        return len(self.exchange.ranks(self.me, group))

    def rank(self, group: str) -> int:
        return self.exchange.ranks(self.me, group).index(self.me)

    def start(self, call: Call, tensor: Tensor) -> Pending:
        return self.exchange.post(self.me, call, tensor)


def _row_bytes(tensor: Tensor) -> int:
    width = 1
    for size in tensor.shape[1:]:
        width *= size
    return width * tensor.element_size()


def _all_to_all(group: str, posts: Sequence[tuple[Call, Tensor]]) -> list[Tensor]:
    sent = np.array([c.send for c, _ in posts])
    expected = np.array([c.recv for c, _ in posts])
    wrong = np.argwhere(expected != sent.T)
    if len(wrong):
        me, other = (int(v) for v in wrong[0])
        raise CommError(
            f"all_to_all over {group!r}: rank {me} of it expects {expected[me, other]} rows from rank {other}, "
            f"{sent[other, me]} came"
        )
    parts = [_split(t, c.send) if known(t) else None for c, t in posts]
    found = []
    for me, (_, tensor) in enumerate(posts):
        if all(p is not None for p in parts):
            found.append(torch.cat([p[me] for p in parts if p is not None]))
        else:
            found.append(_rows(tensor, int(expected[me].sum())))
    return found


def _all_gather(group: str, posts: Sequence[tuple[Call, Tensor]]) -> list[Tensor]:
    tensors = [t for _, t in posts]
    for me, (call, _) in enumerate(posts):
        if call.recv != tuple(map(len, tensors)):
            raise CommError(f"all_gather over {group!r}: rank {me} of it expects {call.recv} rows, others came")
    if all(map(known, tensors)):
        return [torch.cat(tensors)] * len(posts)
    return [_rows(t, sum(map(len, tensors))) for t in tensors]


def _reduce_scatter(group: str, posts: Sequence[tuple[Call, Tensor]]) -> list[Tensor]:
    if len({c.send for c, _ in posts}) > 1:
        raise CommError(f"reduce_scatter over {group!r}: the ranks do not agree on its parts")
    if not all(known(t) for _, t in posts):
        return [_rows(t, c.send[me]) for me, (c, t) in enumerate(posts)]
    whole = torch.stack([t[: sum(c.send)] for c, t in posts]).sum(0)
    return _split(whole, posts[0][0].send)


def _all_reduce(group: str, posts: Sequence[tuple[Call, Tensor]]) -> list[Tensor]:
    if len({t.shape for _, t in posts}) > 1:
        raise CommError(f"all_reduce over {group!r}: the ranks do not agree on its shape")
    if not all(known(t) for _, t in posts):
        return [t for _, t in posts]
    return [torch.stack([t for _, t in posts]).sum(0)] * len(posts)


def _split(tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    return list(tensor[: sum(rows)].split(list(rows)))


def _rows(like: Tensor, count: int) -> Tensor:
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=META)


_RESULTS: dict[str, Any] = {
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
}
