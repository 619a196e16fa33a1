"""What each process of ``test_interleave_door.py`` does: steps of two micro-batches, in turn and interleaved.

The module is imported by spawned processes, so it holds nothing but what they need.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils.checkpoint import checkpoint

import moec
from moec.cost.chunks import ChunkCosts
from moec.cost.links import Link
from moec.interleaving import inner
from moec.parallel import costs, layout_of, piece_costs
from moec.runtime import counters, staged
from tests.compile.blocks import HIDDEN, Block, Layers, tokens

RANKS = 2
PLAIN, DUAL = "ep=2,overlap=2", "ep=2,overlap=2,interleave=always"
COUNTS = ((6, 5), (4, 7))
"""Tokens of the micro-batches of each rank."""
PIECES = ("begin_layer", "begin_gradients", "resume_layer", "end_layer", "end_gradients")
SLOW = Link(0.02, 1e9)


class Attention(nn.Module):
    """One head, and a block of experts behind it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(seed)
        self.q, self.o = (nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=gen) * 0.2) for _ in range(2))
        self.mlp = Block(seed=seed)
        self.drop = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, self.drop)
        scores = torch.softmax(nn.functional.linear(x, self.q) @ x.T, -1)
        x = x + nn.functional.linear(scores @ x, self.o)
        found: Tensor = self.mlp(x)
        return found


def model(layers: int = 1) -> Layers:
    return Layers(*(Attention(seed) for seed in range(layers)))


def order_of(graph: Graph) -> list[tuple[str, int]]:
    """The pieces of a graph in order, each with the place where its layer was begun."""
    layer: dict[Any, int] = {}
    found: list[tuple[str, int]] = []
    for node in graph.nodes:
        name = node.target._schema.name.partition("::")[2] if hasattr(node.target, "_schema") else ""
        if name in PIECES:
            layer[node] = layer.get(node.args[0], len(found)) if name in PIECES[2:] else len(found)
            found.append((name, layer[node]))
        elif name == "all_reduce":
            found.append((name, -1))
    return found


Step = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, ...]]


def both(m: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return m(a), m(b)


def run(
    plan: str, step: Step = both, layers: int = 1, compiler: str = "aot_eager", train: bool = True,
    prepare: Callable[[nn.Module], object] = lambda m: None,
) -> dict[str, Any]:  # fmt: skip
    """What a step finds under a plan: results, gradients, remarks, what ran and in which order."""
    torch._dynamo.reset()
    rank = dist.get_rank()
    m = model(layers)
    moec.parallelize(m, None, plan)
    prepare(m)
    orders: list[list[tuple[str, int]]] = []
    plain = inner.interleave

    def noted(graph: Graph) -> int:
        count = plain(graph)
        orders.append(order_of(graph))
        return count

    inner.interleave = noted  # type: ignore[assignment]
    options = {"inner": compiler, "backends": ["aten"], "checks": "strict"}
    compiled = torch.compile(lambda a, b: step(m, a, b), backend="moec", fullgraph=True, dynamic=False, options=options)
    given = [tokens(n, seed=10 * rank + i).requires_grad_(train) for i, n in enumerate(COUNTS[rank])]
    counters.reset()
    torch.manual_seed(0)
    try:
        with moec.recording() as report, torch.set_grad_enabled(train):
            out = compiled(*given)
            if train:
                sum(x.square().sum() for x in out).backward()  # type: ignore[union-attr]
    finally:
        inner.interleave = plain
    grads = [p.grad for p in m.parameters()] if train else []
    return {
        "out": [x.detach() for x in out],
        "grads": [*(x.grad for x in given if train), *(g.to_local() for g in grads if g is not None)],  # type: ignore[attr-defined]
        "remarks": [r for r in report.remarks if "interleave" in r],
        "ran": dict(counters.snapshot().by_name), "orders": orders, "left": staged.under_way(),
    }  # fmt: skip


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    pairs = [(x, y) for name in ("out", "grads") for x, y in zip(found[name], wanted[name], strict=True)]
    return bool(pairs) and all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def compared(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """A step interleaved, and whether its bits are those of the step in turn."""
    found = run(DUAL, *args, **kwargs)
    return {**found, "same": same(found, run(PLAIN, *args, **kwargs))}


def training() -> dict[str, Any]:
    return compared()


def inductor() -> dict[str, Any]:
    return compared(layers=2, compiler="inductor")


def inference() -> dict[str, Any]:
    return compared(train=False)


def eager() -> dict[str, Any]:
    return run(DUAL, compiler="eager")


def dependent() -> dict[str, Any]:
    return compared(lambda m, a, b: (m(m(a)), b * 1), train=False)


def written() -> dict[str, Any]:
    seen = torch.zeros(HIDDEN)

    def step(m: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        first = m(a)
        seen.copy_(first.sum(0))
        return first, m(b + seen)

    return compared(step, train=False)


def random() -> dict[str, Any]:
    def dropping(m: nn.Module) -> None:
        m.layers[0].drop = 0.5  # type: ignore[index, union-attr]

    return compared(prepare=dropping)


def nested() -> dict[str, Any]:
    def step(m: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(checkpoint(m, x, use_reentrant=False) for x in (a, b))

    return compared(step)


def grad_modes() -> dict[str, Any]:
    def step(m: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            first = m(a)
        return first * 1, m(b)

    return compared(step)


def _with_costs(seconds: float) -> dict[str, Any]:
    """A plan that asks the cost model, with links that are slow and ops of a layer in pieces that take so long."""

    def agreed(m: nn.Module) -> None:
        layout = layout_of(m)
        assert layout is not None
        known = costs._COSTS[layout.group]
        costs._COSTS[layout.group] = replace(known, link=SLOW, chunks=ChunkCosts(0.0, 0.0, 0.0, None))
        piece_costs._seconds[layout.group] = seconds

    return run("ep=2,interleave=auto,step=100000", prepare=agreed)


def pays() -> dict[str, Any]:
    return _with_costs(1e-5)


def does_not_pay() -> dict[str, Any]:
    return _with_costs(1.0)


QUICK: tuple[Callable[[], Any], ...] = (training, inference, eager, pays, does_not_pay)
LONG: tuple[Callable[[], Any], ...] = (inductor, dependent, written, random, nested, grad_modes)


def _main(rank: int, folder: str, cases: tuple[Callable[[], Any], ...]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=90))
    results: dict[str, Any] = {}
    for case in cases:
        torch.save(results, Path(folder) / f"{rank}.pt")
        try:
            results[case.__name__] = case()
        except Exception:  # noqa: BLE001  (any failure is the result: the test shows it, and the other cases still run)
            results[case.__name__] = {"error": traceback.format_exc()}
    torch.save(results, Path(folder) / f"{rank}.pt")
    os._exit(0)


def quick(rank: int, folder: str) -> None:
    """The cases that always run, as one rank."""
    _main(rank, folder, QUICK)


def long(rank: int, folder: str) -> None:
    """The other cases, as one rank."""
    _main(rank, folder, LONG)
