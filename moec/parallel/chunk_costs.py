"""What cutting a layer costs a rank beside its rows, measured: calls of a chunk's ops, and threads that send for it.

A small layer runs whole and in chunks over the group's own links, with experts that do nothing. What is read is
processor time and not the clock: that of the thread that runs the ops for what a chunk calls, and for its part in
sending many bytes rather than few; that of all others, where they share its core, for what else a collective takes of
the experts beside it. So neither slow links nor other programs on the machine are mistaken
for it.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.distributed import groups
from moec.backends.distributed.kernel import ParallelKernel
from moec.backends.distributed.together import Gradients
from moec.cost.chunks import Calls, ChunkCosts
from moec.cost.links import Link
from moec.ir.core import Op
from moec.parallel.costs import Sending, sweep
from moec.parallel.sample import sample_layer
from moec.passes import PassContext, PassManager
from moec.passes.base import Pass
from moec.passes.expert_parallel import ExpertParallel
from moec.passes.overlap import Overlap

CHUNKS = 4
TOKENS, WIDTH = 16, 8
"""Of a rank in the layer that is measured, and of a row."""
MOST_TURNS = 5
_COLLECTIVES = 60
"""About as many as one turn of all programs has, one after the other."""
_SECONDS = 0.2
"""What all turns may take for their links."""


class _Idle(ParallelKernel):
    """A layer whose experts do nothing but sweep the processor's caches, as experts do: what is called next is slower.

    Attributes:
        swept: Processor seconds of it, in the last call and all before.
        first: When the last call came to its first experts, in processor seconds of the calling thread; None before.
    """

    swept = 0.0
    first: float | None = None

    def _sweep(self) -> None:
        start = time.thread_time()
        self.first = start if self.first is None else self.first
        sweep()
        self.swept += time.thread_time() - start

    def _experts(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        self._sweep()
        return [inputs[0]]

    def _experts_backward(self, op: Op, inputs: list[Tensor], gradients: Gradients | None) -> list[Tensor]:
        self._sweep()
        return [t.new_empty(t.shape) for t, need in zip(inputs[1:], op.attrs["needs"], strict=True) if need]


Direction = tuple[_Idle, Callable[[], object]]


BY_EXPERTS, BY_TOKENS = Overlap(chunks=CHUNKS), Overlap(chunks=CHUNKS, along="tokens")


def sample_calls(
    name: str, ranks: int, device: str, spread: Pass | None = None, cuts: Sequence[Pass] = (BY_EXPERTS, BY_TOKENS)
) -> list[tuple[Direction, Direction]]:
    """Forward and backward of the layer: whole, and cut.

    Args:
        name: The group that its programs talk in.
        ranks: Of the group.
        device: Type of the device whose tensors travel.
        spread: The pass that spreads its experts, if not in the flat form.
        cuts: What cuts it.
    """
    experts = CHUNKS * ranks
    x = torch.zeros(TOKENS, WIDTH, device=device)
    ids = torch.arange(2 * TOKENS, device=device).view(TOKENS, 2) % experts
    up, down = (torch.zeros(CHUNKS, a, b, device=device) for a, b in ((2 * WIDTH, WIDTH), (WIDTH, WIDTH)))
    inputs = [x, ids, torch.ones(TOKENS, 2, device=device), up, down]
    made: list[tuple[Direction, Direction]] = []
    for cut in (None, *cuts):
        graph = sample_layer((CHUNKS,) * ranks, CHUNKS, 2, WIDTH, WIDTH, group=name)
        passes = [spread or ExpertParallel(), *([cut] if cut is not None else [])]
        PassManager(passes, repro=None).run(graph, PassContext())
        kernel = _Idle(graph.ops[0], device)

        def forward(kernel: _Idle = kernel) -> object:
            return kernel.forward(inputs)

        def backward(kernel: _Idle = kernel) -> object:
            return kernel.backward([x], inputs, [True, False, True, True, True])

        made.append(((kernel, forward), (kernel, backward)))
    return made


def own_seconds(kernel: _Idle, call: Callable[[], object], turns: int) -> Calls:
    """Processor seconds of the calling thread without its experts, medians of some calls behind a first."""
    took, front = [], []
    for _ in range(turns + 1):
        kernel.first, start, swept = None, time.thread_time(), kernel.swept
        call()
        took.append(time.thread_time() - start - (kernel.swept - swept))
        front.append((kernel.first or start) - start)
    return Calls(statistics.median(took[1:]), statistics.median(front[1:]))


def spare_cores(process_group: Any) -> bool:
    """Whether every rank's computing threads leave a core to those that send; ranks that share cores share them all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    mine = (socket.gethostname(), tuple(cores), torch.get_num_threads())
    everyone: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, mine, group=process_group)
    return all(
        sum(threads + 1 for h, c, threads in everyone if (h, c) == (host, own)) <= len(own) for host, own, _ in everyone
    )


def turns_on(link: Link) -> int:
    """How often the layer runs on such links."""
    return max(2, min(MOST_TURNS, int(_SECONDS / (_COLLECTIVES * link.alpha_s + 1e-9))))


def taken(sending: tuple[Sending, Sending], shared: bool) -> list[float]:
    """Seconds that a small all-to-all takes of the experts beside it, and a large one more than that.

    Args:
        sending: Both.
        shared: Whether threads that send share cores with those that compute.
    """
    small, large = sending
    return [small.others * shared, large.own - small.own + (large.others - small.others) * shared]


def burden_of(sending: tuple[Sending, Sending], least: float, more: float, device: str) -> Link | None:
    """What a collective takes of the processor, as :func:`taken` says; None where experts run on another device."""
    if device != "cpu":
        return None
    small, large = sending
    rate = (large.bytes - small.bytes) / max(more, 1e-9)
    return Link(max(0.0, least - small.bytes / rate), rate)


def measure_chunks(
    group: str, process_group: Any, device: str, link: Link, sending: tuple[Sending, Sending]
) -> ChunkCosts:
    """Run the layer; all ranks of the group call this together, and the slowest counts.

    Args:
        group: What programs call it.
        process_group: torch's handle.
        device: Type of the device whose tensors travel.
        link: The group's links: the slower they are, the fewer turns.
        sending: What :func:`moec.parallel.costs.measure` says of a small and of a large all-to-all.
    """
    turns = turns_on(link)
    name = f"{group}.sample"
    groups.bind(name, process_group)
    try:
        calls = sample_calls(name, dist.get_world_size(process_group), device)
        whole, experts, tokens = ([own_seconds(*c, turns) for c in each] for each in calls)
    finally:
        groups.unbind(name)
    shared = not spare_cores(process_group)
    pairs = [(experts[0], whole[0]), (tokens[0], whole[0]), (experts[1], whole[1])]
    mine = [seconds for cut, once in pairs for seconds in (cut.all - once.all, cut.front - once.front)]
    mine += taken(sending, shared)
    slowest = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=process_group)
    *cut_s, least, more = slowest.tolist()
    each = [max(0.0, seconds / CHUNKS) for seconds in cut_s]
    forward, by_tokens, backward = (Calls(a, min(a, f)) for a, f in zip(each[::2], each[1::2], strict=True))
    return ChunkCosts(forward, by_tokens, backward, burden_of(sending, least, more, device))
