"""What cutting a layer costs a rank beside its rows, measured: calls of a chunk's ops, and threads that send for it.

A small layer runs whole and in chunks over the group's own links, with experts that do nothing. What is read is
processor time and not the clock: that of the thread that runs the ops for what a chunk calls, that of all others for
what a collective takes of the experts beside it. So neither slow links nor other programs on the machine are mistaken
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
from moec.cost.chunks import ChunkCosts
from moec.cost.links import Link
from moec.ir.core import Op
from moec.parallel.sample import sample_layer
from moec.passes import PassContext, PassManager

CHUNKS = 4
TOKENS, WIDTH = 16, 8
"""Of a rank in the layer that is measured, and of a row."""
MOST_TURNS = 8
_COLLECTIVES = 60
"""About as many as one turn of all programs has, one after the other."""
_SECONDS = 0.2
"""What all turns may take for their links."""


class _Idle(ParallelKernel):
    """A layer whose experts do nothing."""

    def _experts(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        return [inputs[0]]

    def _experts_backward(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        return [t.new_empty(t.shape) for t, need in zip(inputs[1:], op.attrs["needs"], strict=True) if need]


def _calls(name: str, ranks: int, device: str) -> list[tuple[Callable[[], object], Callable[[], object]]]:
    """Forward and backward of the layer: whole, in chunks of experts, and in chunks of tokens."""
    experts = CHUNKS * ranks
    x = torch.zeros(TOKENS, WIDTH, device=device)
    ids = torch.arange(2 * TOKENS, device=device).view(TOKENS, 2) % experts
    up, down = (torch.zeros(CHUNKS, a, b, device=device) for a, b in ((2 * WIDTH, WIDTH), (WIDTH, WIDTH)))
    inputs = [x, ids, torch.ones(TOKENS, 2, device=device), up, down]
    made: list[tuple[Callable[[], object], Callable[[], object]]] = []
    for cut in ("", f",overlap{{chunks={CHUNKS}}}", f",overlap{{chunks={CHUNKS},along=tokens}}"):
        graph = sample_layer((CHUNKS,) * ranks, CHUNKS, 2, WIDTH, WIDTH, group=name)
        PassManager(f"expert-parallel{cut}", repro=None).run(graph, PassContext())
        kernel = _Idle(graph.ops[0], device)

        def forward(kernel: _Idle = kernel) -> object:
            return kernel.forward(inputs)

        def backward(kernel: _Idle = kernel) -> object:
            return kernel.backward([x], inputs, [True, False, True, True, True])

        made.append((forward, backward))
    return made


def own_seconds(call: Callable[[], object], turns: int) -> float:
    """Processor seconds of the calling thread, median of some calls behind a first."""
    took = []
    for _ in range(turns + 1):
        start = time.thread_time()
        call()
        took.append(time.thread_time() - start)
    return statistics.median(took[1:])


def spare_cores(process_group: Any) -> bool:
    """Whether every rank's computing threads leave a core to those that send; ranks that share cores share them all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    mine = (socket.gethostname(), tuple(cores), torch.get_num_threads())
    everyone: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, mine, group=process_group)
    return all(
        sum(threads + 1 for h, c, threads in everyone if (h, c) == (host, own)) <= len(own) for host, own, _ in everyone
    )


def measure_chunks(
    group: str, process_group: Any, device: str, link: Link, sending: Sequence[tuple[float, float]]
) -> ChunkCosts:
    """Run the layer; all ranks of the group call this together, and the slowest counts.

    Args:
        group: What programs call it.
        process_group: torch's handle.
        device: Type of the device whose tensors travel.
        link: The group's links: the slower they are, the fewer turns.
        sending: (bytes of a rank, processor seconds of this rank's other threads) of a small and of a large all-to-all.
    """
    turns = max(2, min(MOST_TURNS, int(_SECONDS / (_COLLECTIVES * link.alpha_s + 1e-9))))
    name = f"{group}.sample"
    groups.bind(name, process_group)
    try:
        calls = _calls(name, dist.get_world_size(process_group), device)
        whole, experts, tokens = ([own_seconds(c, turns) for c in each] for each in calls)
    finally:
        groups.unbind(name)
    (few, least), (many, most) = sending
    mine = [experts[0] - whole[0], tokens[0] - whole[0], experts[1] - whole[1], least, most]
    slowest = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=process_group)
    forward, by_tokens, backward, least, most = slowest.tolist()
    chunks = [max(0.0, more / CHUNKS) for more in (forward, by_tokens, backward)]
    burden: Link | None = None
    if not spare_cores(process_group) and device == "cpu":
        rate = (many - few) / max(most - least, 1e-9)
        burden = Link(max(0.0, least - few / rate), rate)
    return ChunkCosts(chunks[0], chunks[1], chunks[2], burden)
