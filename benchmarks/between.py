"""What runs between a start and its wait, measured on two ranks whose links are slow on purpose.

    python benchmarks/between.py --ms 4

Two programs: a layer with a shared expert, which runs before the layer or inside it; and two micro-batches through two
layers with attention, one after the other or interleaved. Both are whole exported programs on the backend ``aten``, one
thread a rank; links take what ``moec.testing.delayed_group`` says, and no processor meanwhile.
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

import moec
from moec.backends.distributed import groups
from moec.cost.links import Link
from moec.runtime import unshard  # noqa: F401  (registers torch.ops.moec.unshard)
from moec.testing import delayed_group

RANKS, EXPERTS, TOP_K = 2, 8, 2
TURNS = 7
PASSES = {
    "shared expert": ("default,expert-parallel", "default,expert-parallel,carry-shared-experts"),
    "two micro-batches": ("default,expert-parallel", "default,expert-parallel,interleave-layers"),
}


class Model(nn.Module):
    """``layers`` of attention and experts on two ranks, for ``batches`` that have nothing to do with each other."""

    def __init__(self, rank: int, batches: int, layers: int, hidden: int, inner: int, shared: int) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        own = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
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
            x = x + torch.softmax(x @ self.q @ x.T, -1) @ x
        weights, ids = (x @ self.router.T).softmax(-1).topk(TOP_K, -1)
        sizes = [EXPERTS // RANKS] * RANKS
        up, down = (torch.ops.moec.unshard.default(w, sizes, "ep", 1.0) for w in (self.up, self.down))
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
    groups.bind("ep", delayed_group(Link(1e-4, sent / (ms * 1e-3))))
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
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    os._exit(0)


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


if __name__ == "__main__":
    main()
