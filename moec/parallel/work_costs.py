"""What a rank computes beside the kernels of its experts, measured where ranks agree on costs.

Three things: products of tokens with a matrix, as PyTorch runs them (attention's, and those of experts on the backend
``aten``), bytes that an op reads and writes into fresh memory, and what it takes to call the ops of a layer's program.
The slowest rank of a group counts, so that all of them decide the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.distributed import groups
from moec.backends.distributed.kernel import ParallelKernel
from moec.backends.distributed.together import Gradients
from moec.cost.curve import LayerCurve
from moec.cost.layer import LayerShape
from moec.cost.machine import GemmCurve, rising
from moec.ir.beside import EXPERTS
from moec.ir.core import Graph, Op
from moec.ir.torch_dtypes import TO_TORCH
from moec.parallel.sample import sample_layer
from moec.passes import PassContext, PassManager

ROWS = (1, 16, 64, 256)
"""Rows of the products that are timed."""
EXPERT_PRODUCTS = 2.5
"""Products of an expert's backward on ``aten`` over those of its forward: the up GEMM again, and two for each."""
_SIDE, _MATRICES = 512, 8
_MOVED = 1 << 19
_TOKENS, _WIDTH, _OWN = 16, 8, 4
_TURNS = 9


@dataclass(frozen=True)
class WorkTimes:
    """What the ranks of a group measured together.

    Attributes:
        products: Of each element type, nanoseconds for each element of a matrix by the rows that it is multiplied by.
        bytes_per_s: Read and written together by an op whose result is fresh memory.
        op_s: Of one op of a layer's program, forward and backward, beside experts and whatever it moves.
    """

    products: tuple[GemmCurve, ...]
    bytes_per_s: float
    op_s: tuple[float, float]

    def product(self, rows: float, elements: float, dtype: str) -> float | None:
        """Seconds of ``rows`` rows times a matrix of so many elements; None for a type that nobody measured."""
        curve = next((c for c in self.products if c.dtype == dtype), None)
        return None if curve is None else curve.seconds(rows) * elements

    def rate(self, dtype: str) -> float | None:
        """Operations a second of products of many rows."""
        took = self.product(ROWS[-1], 1.0, dtype)
        return None if took is None else 2 * ROWS[-1] / took

    def experts(self, shape: LayerShape, backward: bool) -> LayerCurve | None:
        """Times of a layer's experts on ``aten``: products one by one, and what the ops between them move."""
        points: list[tuple[float, float]] = []
        times = EXPERT_PRODUCTS if backward else 1.0
        row = (2 * shape.hidden + 3 * shape.parts * shape.inner + 2 * shape.width) * shape.item
        written = 2 * shape.elements * shape.item if backward else 0.0  # gradients of weights
        for rows in ROWS:
            took = self.product(rows, shape.elements, shape.dtype)
            if took is None:
                return None
            points.append((float(rows), took * times + (rows * row * times + written) / self.bytes_per_s))
        return LayerCurve(0.0, tuple(points))


_TIMES: dict[str, WorkTimes] = {}


def times_of(group: str) -> WorkTimes | None:
    """What the ranks of ``group`` measured; None where they did not."""
    return _TIMES.get(group)


def layer_ops(region: Graph) -> list[Op]:
    """Ops of a layer's program that are called between its experts and its collectives."""
    return [op for op in region.ops[:-1] if op.dialect != "comm" and op.name not in EXPERTS]


def measure_work(group: str, process_group: Any, device: str) -> None:
    """Time them; all ranks of the group call this together. About a tenth of a second.

    Args:
        group: What programs call it.
        process_group: torch's handle.
        device: Type of the device whose tensors travel; only processors are measured.
    """
    if device != "cpu":
        return
    types = ("f32", "bf16")
    mine = [_product(rows, TO_TORCH[name], process_group) for name in types for rows in ROWS]
    slowest = torch.tensor(
        [*mine, _moving(process_group), *_calling(f"{group}.work", process_group)], dtype=torch.float64
    )
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=process_group)
    *took, byte, forward, backward = slowest.tolist()
    curves = []
    for i, name in enumerate(types):
        own = took[i * len(ROWS) : (i + 1) * len(ROWS)]
        points = [(rows, s * 1e9 / _SIDE**2) for rows, s in zip(ROWS, own, strict=True)]
        curves.append(GemmCurve(name, "torch", torch.get_num_threads(), rising(points)))
    _TIMES[group] = WorkTimes(tuple(curves), 1 / byte, (forward, backward))


def _median(call: Callable[[int], object], process_group: Any) -> float:
    """Seconds of a call while the other ranks make it too: those of one machine share its caches, memory and cores."""
    took = []
    dist.barrier(group=process_group)
    for turn in range(_TURNS + 1):
        start = time.perf_counter()
        call(turn)
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


def _product(rows: int, dtype: torch.dtype, process_group: Any) -> float:
    """Of ``rows`` rows times a matrix that no cache holds: others were read meanwhile."""
    x = torch.zeros(rows, _SIDE, dtype=dtype)
    weights = [torch.zeros(_SIDE, _SIDE, dtype=dtype) for _ in range(_MATRICES)]
    return _median(lambda turn: torch.nn.functional.linear(x, weights[turn % _MATRICES]), process_group)


def _moving(process_group: Any) -> float:
    """Of a byte that is read or written, into memory that nothing had before."""
    given, kept = torch.ones(_MOVED), list[Tensor]()
    return _median(lambda _: kept.append(given * 2.0), process_group) / (2 * given.numel() * given.element_size())


class _NoExperts(ParallelKernel):
    """A layer whose experts do nothing."""

    def _experts(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        return [inputs[0]]

    def _experts_backward(self, op: Op, inputs: list[Tensor], gradients: Gradients | None) -> list[Tensor]:
        return [t.new_empty(t.shape) for t, need in zip(inputs[1:], op.attrs["needs"], strict=True) if need]


def _calling(name: str, process_group: Any) -> tuple[float, float]:
    """Processor seconds of an op of a small layer's program, forward and backward."""
    ranks = dist.get_world_size(process_group)
    graph = sample_layer((_OWN,) * ranks, _OWN, 2, _WIDTH, _WIDTH, group=name)
    PassManager("expert-parallel", repro=None).run(graph, PassContext())
    kernel = _NoExperts(graph.ops[0], "cpu")
    ids = torch.arange(2 * _TOKENS).view(_TOKENS, 2) % (_OWN * ranks)
    weights = [torch.zeros(_OWN, 2 * _WIDTH, _WIDTH), torch.zeros(_OWN, _WIDTH, _WIDTH)]
    inputs = [torch.zeros(_TOKENS, _WIDTH), ids, torch.ones(_TOKENS, 2), *weights]
    calls: list[Callable[[], object]] = [
        lambda: kernel.forward(inputs),
        lambda: kernel.backward([inputs[0]], inputs, [True, False, True, True, True]),
    ]
    groups.bind(name, process_group)
    found = []
    try:
        for call, region in zip(calls, graph.ops[0].regions, strict=True):
            took = []
            for _ in range(_TURNS + 1):
                start = time.thread_time()
                call()
                took.append(time.thread_time() - start)
            found.append(statistics.median(took[1:]) / len(layer_ops(region)))
    finally:
        groups.unbind(name)
    return found[0], found[1]
