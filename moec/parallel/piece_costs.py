"""What an op of a layer in pieces takes of a rank's processor, measured.

A program of nothing but waits runs in pieces, and the ops that run it on are counted against processor time, not the
clock. The slowest rank of a group counts, so that all of them decide the same.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from moec.backends.distributed.world import WORLD
from moec.ir.comm_semantics import running_in
from moec.ir.parser import parse_graph
from moec.ir.staged import Staged, stops

_WAITS = 64
_TURNS = 5
_seconds: dict[str, float] = {}


def piece_seconds(group: str) -> float | None:
    """Processor seconds of one op on a rank of a group; None where its ranks did not measure it together."""
    return _seconds.get(group)


def measure_pieces(group: str, process_group: Any, device: str) -> None:
    """Time the ops; all ranks of the group call this together.

    Args:
        group: What programs call it.
        process_group: torch's handle.
        device: Type of the device whose tensors travel.
    """
    slowest = torch.tensor([min(_once() for _ in range(_TURNS))], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=process_group)
    _seconds[group] = float(slowest)


def _once() -> float:
    from moec.runtime import staged  # it runs programs, whose kernels ask this module for costs

    lines = []
    for i in range(_WAITS):
        given = "%x" if i == 0 else f"%y{i - 1}"
        lines.append(f'%t{i} = comm.all_to_all.start {given} {{group = "none", ranks = 1}} : !comm.token')
        lines.append(f"%y{i} = comm.wait %t{i} : f32[T, 1]")
    text = "graph @pieces(%x: f32[T, 1]) -> f32[T, 1] {\n  " + "\n  ".join(lines) + f"\n  return %y{_WAITS - 1}\n}}"
    region, x = parse_graph(text), torch.zeros(1, 1)
    with running_in(WORLD):
        begun = Staged(region, [x], stops(region), lambda op, values: list(values))
    layer = staged.keep(begun, [x])
    start = time.thread_time()
    for _ in range(_WAITS - 1):
        layer = torch.ops.moec.resume_layer.default(layer, layer)
    took = time.thread_time() - start
    torch.ops.moec.end_layer.default(layer, [x], "")
    return took / (_WAITS - 1)
