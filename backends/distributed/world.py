"""Collectives of programs, by torch.distributed: gloo, NCCL, HCCL or whatever the process group was made with.

1. A start is asynchronous; what stands between it and its wait runs meanwhile.
2. Sums over ranks are taken here, in order of ranks, on parts that an all-to-all brought: the same bits in every run.
3. What fails or takes too long becomes one error that names the collective and the ranks that did not take part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.distributed import faults, traffic
from moec.backends.distributed.groups import Group, find
from moec.ir.comm_semantics import Call, Pending, World


class ProcessWorld(World):
    """The groups that :mod:`moec.backends.distributed.groups` binds, seen from this process."""

    def size(self, group: str) -> int:
        return len(find(group).ranks)

    def rank(self, group: str) -> int:
        return dist.get_rank(find(group).process_group)

    def start(self, call: Call, tensor: Tensor) -> Pending:
        group = find(call.group)
        me, size = dist.get_rank(group.process_group), len(group.ranks)
        traffic.count(call.kind, call.group, call.bytes_sent(tensor, me, size))
        ticket = faults.enter(call.kind, group)
        with faults.explained(ticket, group):
            work, finish = _begin(call, tensor, group, me)
        return Pending(lambda: _finish(ticket, group, work, finish))


def _finish(ticket: faults.Ticket, group: Group, work: dist.Work, finish: Callable[[], Tensor]) -> Tensor:
    with faults.explained(ticket, group):
        work.wait(faults.limit())
    return finish()


def _begin(call: Call, tensor: Tensor, group: Group, me: int) -> tuple[dist.Work, Callable[[], Tensor]]:
    """Start the collective; what to wait for, and how to make the result of it."""
    size = len(group.ranks)
    if call.kind == "all_to_all":
        return _all_to_all(tensor[: sum(call.send)], call.send, call.recv, group)
    if call.kind == "all_gather":
        return _all_to_all(torch.cat([tensor] * size), (len(tensor),) * size, call.recv, group)
    if call.kind == "reduce_scatter":
        own = call.send[me]
        work, parts = _all_to_all(tensor[: sum(call.send)], call.send, (own,) * size, group)
        return work, lambda: _sum(parts().view(size, own, *tensor.shape[1:]))
    flat = tensor.reshape(1, -1)
    work, parts = _all_to_all(torch.cat([flat] * size), (1,) * size, (1,) * size, group)
    return work, lambda: _sum(parts()).view(tensor.shape)


def _sum(parts: Tensor) -> Tensor:
    """``parts[0] + parts[1] + ...`` in this order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _all_to_all(
    rows: Tensor, send: tuple[int, ...], recv: tuple[int, ...], group: Group
) -> tuple[dist.Work, Callable[[], Tensor]]:
    rows = rows.contiguous()
    out = rows.new_empty((sum(recv), *rows.shape[1:]))
    work = dist.all_to_all_single(out, rows, list(recv), list(send), group=group.process_group, async_op=True)

    def finish(_kept: Tensor = rows) -> Tensor:  # the rows must live until they are sent
        return out

    assert work is not None
    return work, finish


WORLD = ProcessWorld()
