"""What runs between a start and its wait, measured on two ranks whose links are slow on purpose.

    python benchmarks/between.py --ms 4

Two programs: a layer with a shared expert, which runs before the layer or inside it; and two micro-batches through two
layers with attention, one after the other or interleaved. Both are whole exported programs on the backend ``aten``, one
thread a rank; links take what ``moec.testing.delayed_group`` says, and no processor meanwhile. Then two micro-batches
through the compile door (``aot_eager``), with their backward.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import moec
from moec.backends.distributed import groups
from moec.cost.links import Link
from moec.parallel import layout_of
from moec.parallel.costs import agree
from moec.parallel.parallelize import own_costs
from moec.parallel.piece_costs import measure_pieces
from moec.parallel.work_costs import measure_work
from moec.runtime import unshard  # noqa: F401  (registers torch.ops.moec.unshard)
from moec.testing import delayed_group

RANKS, EXPERTS, TOP_K = 2, 8, 2
TURNS = 15
PASSES = {
    "shared expert": ("default,expert-parallel", "default,expert-parallel,carry-shared-experts"),
    "two micro-batches": ("default,expert-parallel", "default,expert-parallel,interleave-layers"),
}


class Model(nn.Module):
    """``layers`` of attention and experts on two ranks, for ``batches`` that have nothing to do with each other.

    With ``whole`` it holds all experts, and is still to be dealt out to the ranks.
    """

    def __init__(
        self, rank: int, batches: int, layers: int, hidden: int, inner: int, shared: int, whole: bool = False
    ) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        own = slice(None) if whole else slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        self.whole = whole
        self.batches, self.layers = batches, layers

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen) * 0.05

        self.q, self.router = nn.Parameter(weight(hidden, hidden)), nn.Parameter(weight(EXPERTS, hidden))
        self.up = nn.Parameter(weight(EXPERTS, inner, hidden)[own].clone())
        self.down = nn.Parameter(weight(EXPERTS, hidden, inner)[own].clone())
        self.shared = nn.ModuleList([nn.Linear(hidden, shared, bias=False), nn.Linear(shared, hidden, bias=False)])
        self.has_shared = bool(shared)

    def layer(self, x: Tensor) -> Tensor:
        if self.batches > 1:
            heads = x[None, None]
            x = x + F.scaled_dot_product_attention((x @ self.q)[None, None], heads, heads)[0, 0]
        weights, ids = (x @ self.router.T).softmax(-1).topk(TOP_K, -1)
        sizes = [EXPERTS // RANKS] * RANKS
        up, down = self.up, self.down
        if not self.whole:
            up, down = (torch.ops.moec.unshard.default(w, sizes, "ep", 1.0) for w in (up, down))
        rows, flat = x.repeat_interleave(TOP_K, dim=0), ids.reshape(-1)
        inner = torch.relu(torch.bmm(up[flat], rows.unsqueeze(-1)).squeeze(-1))
        out = torch.bmm(down[flat], inner.unsqueeze(-1)).squeeze(-1)
        y = (out * weights.reshape(-1, 1)).view(-1, TOP_K, x.shape[-1]).sum(dim=1)
        return y + self.shared[1](torch.relu(self.shared[0](x))) if self.has_shared else y

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(self.batches))
        for _ in range(self.layers):
            parts = [part + self.layer(part) for part in parts]
        return torch.cat(parts)


def measure(rank: int, folder: str, ms: float, tokens: int, hidden: int, inner: int) -> None:
    """As one rank: the median time of every program, before and after, and whether the bits are the same."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    sent = tokens * TOP_K / RANKS * hidden * 4  # bytes that leave a rank in one all-to-all, all tokens together
    link = Link(1e-4, sent / (ms * 1e-3))
    groups.bind("ep", delayed_group(link))
    found: dict[str, Any] = {}
    for name, pair in PASSES.items():
        dual = name == "two micro-batches"
        model = Model(rank, 2 if dual else 1, 2 if dual else 1, hidden, inner, 0 if dual else inner)
        x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(rank))
        program = torch.export.export(model, (x,), strict=False)
        modules = [moec.optimize(program, passes=p, backends=("aten",)).module() for p in pair]
        with torch.no_grad():
            outs = [m(x) for m in modules]
            took: list[list[float]] = [[], []]
            for _ in range(TURNS):  # in turns, so that both see the same machine
                for i, m in enumerate(modules):
                    dist.barrier()
                    start = time.perf_counter()
                    m(x)
                    took[i].append(time.perf_counter() - start)
        found[name] = {"ms": [1e3 * statistics.median(t) for t in took], "equal": torch.equal(outs[0], outs[1])}
    found["training"] = train(rank, link, tokens, hidden, inner)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)


PLANS = ("ep=2,step={0}", "ep=2,step={0},interleave=always", "ep=2,step={0},interleave=auto,length={0}")


def train(rank: int, link: Link, tokens: int, hidden: int, inner: int) -> dict[str, Any]:
    """Forward and step of the two micro-batches through the compile door, by plan; and what the last plan said."""
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(rank))
    runs: list[tuple[Any, Any]] = []
    grads, remarks = [], []
    for plan in PLANS:
        torch._dynamo.reset()
        model: Any = Model(rank, 2, 2, hidden, inner, 0, whole=True)
        moec.parallelize(model, None, plan.format(tokens // 2))
        layout = layout_of(model)
        assert layout is not None
        groups.unbind(layout.group)
        slow = delayed_group(link)
        groups.bind(layout.group, slow)
        agree(layout.group, slow, "cpu", own_costs)  # the links as they are now
        measure_pieces(layout.group, slow, "cpu")
        measure_work(layout.group, slow, "cpu")
        options = {"inner": "aot_eager", "backends": ["aten"]}
        run = torch.compile(model, backend="moec", fullgraph=True, options=options)
        with moec.recording() as report:
            run(x).square().sum().backward()
        remarks = [r for r in report.remarks if "interleave" in r]
        grads.append([p.grad.to_local().clone() for p in model.parameters() if isinstance(p.grad, DTensor)])
        runs.append((model, run))
    took: list[list[tuple[float, float]]] = [[] for _ in PLANS]
    for _ in range(TURNS):
        for i, (model, run) in enumerate(runs):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            out = run(x)
            between = time.perf_counter()
            out.square().sum().backward()
            took[i].append((between - start, time.perf_counter() - start))
    medians = [[1e3 * statistics.median(t[j] for t in each) for j in (0, 1)] for each in took]
    same = all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))
    return {"ms": medians, "equal": same and bool(grads[0]), "remarks": remarks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms", type=float, default=4.0, help="of one all-to-all of all tokens' rows")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, args.ms, args.tokens, args.hidden, args.inner)
        torch.multiprocessing.spawn(measure, given, RANKS)  # type: ignore[no-untyped-call, attr-defined]
        found = [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(RANKS)]
    for name in PASSES:
        before, after = (max(f[name]["ms"][i] for f in found) for i in (0, 1))
        same = all(f[name]["equal"] for f in found)
        print(f"{name}: {before:.2f} ms, {after:.2f} ms with what runs between ({before - after:.2f} ms less); {same}")
    trained = [f["training"] for f in found]
    for plan, *times in zip(PLANS, *(t["ms"] for t in trained), strict=True):
        forward, step = (max(t[j] for t in times) for j in (0, 1))
        print(f"training, {plan.format(args.tokens // 2)}: forward {forward:.2f} ms, with backward {step:.2f} ms")
    print(f"same gradients: {all(t['equal'] for t in trained)}", *trained[0]["remarks"], sep="\n")


if __name__ == "__main__":
    main()
