"""What the ranks of a group plan with: one cost model for all, and links that they measured together.

Ranks whose schedules differ would wait for each other for ever. So the first rank's profile of its processor counts for
all of them, and times of links are those of the slowest rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moec.cost.chunks import ChunkCosts
from moec.cost.links import Link
from moec.cost.machine import MachineProfile
from moec.cost.store import from_json, to_json

SMALL, LARGE = 1 << 12, 1 << 22
"""Bytes that a rank sends each other rank, when links are measured."""
LINED_UP = 5
"""All-to-alls that are under way together, when latency is measured."""
SWEPT = 1 << 24
"""Bytes that are read and written so that caches hold little of what came before, as behind experts."""
_TURNS = 7
_Begun = TypeVar("_Begun")


@dataclass(frozen=True)
class GroupCosts:
    """What all ranks of a group plan with.

    Attributes:
        machine: The processor of the first of them.
        isa: Instruction set of the kernels there.
        threads: Threads of a rank there.
        link: Between any two.
        chunks: What cutting a layer costs beside its rows.
    """

    machine: MachineProfile
    isa: str
    threads: int
    link: Link
    chunks: ChunkCosts


_COSTS: dict[str, GroupCosts] = {}


def costs_of(group: str) -> GroupCosts | None:
    """What the ranks of ``group`` agreed on; None where they did not."""
    return _COSTS.get(group)


def keep_costs(group: str, costs: GroupCosts) -> None:
    """Say what the ranks of ``group`` agreed on."""
    _COSTS[group] = costs


def fit(small: float, large: float, ranks: int) -> Link:
    """The links on which all-to-alls of :data:`SMALL` and of :data:`LARGE` bytes a rank take so many seconds."""
    more = (LARGE - SMALL) * (ranks - 1)
    rate = more / max(large - small, 1e-9)
    return Link(max(0.0, small - SMALL * (ranks - 1) / rate), rate)


@lru_cache(maxsize=1)
def _memory() -> Tensor:
    return torch.zeros(SWEPT, dtype=torch.uint8)


def sweep(bytes: int = SWEPT) -> None:
    """Sweep the caches; :data:`SWEPT` is the most."""
    _memory()[:bytes].add_(1)


@dataclass(frozen=True)
class Sending:
    """What an all-to-all takes of a rank's processor.

    Attributes:
        bytes: That leave the rank.
        own: Seconds of the thread that calls it, once its rows are under way: it copies what came to its place.
        others: Of all others of the process, from the start on.
    """

    bytes: float
    own: float
    others: float


def processor_seconds(begin: Callable[[], _Begun], end: Callable[[_Begun], object]) -> tuple[float, float]:
    """Of this thread while what was begun is ended, and of all others of this process from the start on."""
    first, all_of_it = time.thread_time(), time.process_time()
    begun = begin()
    under_way = time.thread_time()
    end(begun)
    last = time.thread_time()
    return last - under_way, time.process_time() - all_of_it - (last - first)


def measure(process_group: Any, device: str) -> tuple[Link, tuple[Sending, Sending]]:
    """Time all-to-alls of two sizes; all ranks of the group call this together. About a tenth of a second on gloo.

    The latency is what one more all-to-all adds to others under way, as chunks' are: what a call takes before it has
    begun is the processor's time, and not the links'. It is the difference of the quickest turns, as other programs
    only ever add to one; where they hide it all the same, the call counts as latency.

    Returns:
        The links, and what a small and a large all-to-all take of this rank's processor.
    """
    ranks = dist.get_world_size(process_group)
    slowest: list[tuple[float, float]] = []  # the median and the quickest turn
    sending: list[Sending] = []
    for size, many in ((SMALL, 1), (LARGE, 1), (SMALL, LINED_UP)):
        sent = torch.zeros(size * ranks, dtype=torch.uint8, device=device)

        def begin(sent: Tensor = sent, many: int = many) -> list[Any]:
            came = [torch.empty_like(sent) for _ in range(many)]  # as in a program: its memory may be fresh
            return [dist.all_to_all_single(c, sent, group=process_group, async_op=True) for c in came]

        def end(begun: list[Any]) -> None:
            for work in begun:
                work.wait()
            if device == "cuda":
                torch.cuda.synchronize()

        took, threads = [], []
        for _ in range(_TURNS + 1):
            if device == "cpu":
                sweep()
            dist.barrier(group=process_group)
            start = time.perf_counter()
            threads.append(processor_seconds(begin, end))
            took.append(time.perf_counter() - start)
        sending.append(Sending(float(size * (ranks - 1)), *map(statistics.median, zip(*threads[1:], strict=True))))
        mine = torch.tensor([statistics.median(took[1:]), min(took[1:])], dtype=torch.float64, device=device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=process_group)
        slowest.append((float(mine[0]), float(mine[1])))
    (one, quickest), (large, _), (_, lined_up) = slowest
    link = fit(one, large, ranks)
    more = (lined_up - quickest) / (LINED_UP - 1) - SMALL * (ranks - 1) / link.bytes_per_s
    return replace(link, alpha_s=more) if 0 < more < link.alpha_s else link, (sending[0], sending[1])


def agree(
    group: str, process_group: Any, device: str, own: Callable[[], tuple[MachineProfile, str] | None]
) -> GroupCosts | None:
    """Measure links and chunks, and take the first rank's profile; all ranks of the group call this together.

    Args:
        group: What programs call it.
        process_group: torch's handle.
        device: Type of the device whose tensors travel.
        own: This rank's processor and instruction set; None where the cost model knows neither.
    """
    from moec.parallel.chunk_costs import measure_chunks  # it runs programs, which ask this module for costs

    link, sending = measure(process_group, device)
    chunks = measure_chunks(group, process_group, device, link, sending)
    first = dist.get_process_group_ranks(process_group)[0]
    known = own() if dist.get_rank() == first else None
    said: list[Any] = [None if known is None else (to_json(known[0]), known[1], torch.get_num_threads())]
    dist.broadcast_object_list(said, src=first, group=process_group)
    if said[0] is None:
        _COSTS.pop(group, None)
        return None
    machine, isa, threads = said[0]
    _COSTS[group] = GroupCosts(from_json(machine), isa, threads, link, chunks)
    return _COSTS[group]
