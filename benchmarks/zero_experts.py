"""A layer with zero-compute experts on the cpu backend: with ``eliminate-zero-experts`` and without.

    python benchmarks/zero_experts.py --threads 2
    python benchmarks/zero_experts.py --shapes small --tokens 64 --share 0.5 --json zero.json

The layer is written for static shapes, as serving engines write it: a slot that goes to a zero-compute expert takes
expert 0 with weight 0, and its own part, weight times token, is added beside the experts. It is compiled twice through
the ``torch.compile`` door, once with the default pipeline and once with this pass left out. Both get the same tokens
and router choices, in one process, one call each in turn; times are medians. Rows are counted from the ids that reach
the kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moec.backends.cpu.kernel import CpuExperts
from moec.passes.pipelines import PIPELINES
from shapes import DTYPES, Shape, parse_tokens

PASS = "eliminate-zero-experts"
LAYERS = {
    # LongCat-Flash has 512 such experts and 256 identity experts, 12 a token: more weights than most machines hold.
    "longcat-32": Shape("longcat-32", 6144, 2048, 32, 12),
    "small": Shape("small", 2048, 1024, 64, 8),
    "toy": Shape("toy", 64, 32, 8, 4),
}
FEWEST_ROUNDS = 3
TOLERANCE = 3e-2
"""Largest |difference| of the two variants over the largest value."""


class Layer(nn.Module):
    """Experts 0 .. E-1 have weights, all further ids are identity experts."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        e, h, i = shape.experts, shape.hidden, shape.inner
        self.up = nn.Parameter(torch.empty(e, 2 * i, h, dtype=dtype).uniform_(-0.03, 0.03), requires_grad=False)
        self.down = nn.Parameter(torch.empty(e, h, i, dtype=dtype).uniform_(-0.03, 0.03), requires_grad=False)

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        """x [T, H], ids and w [T, k] -> [T, H]."""
        zero = ids >= self.shape.experts
        y = self.experts(x, torch.where(zero, 0, ids), torch.where(zero, 0, w))
        return y + (w * zero).sum(-1, keepdim=True).to(x.dtype) * x

    def experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        """Every slot through the expert that its id names."""
        k, flat = ids.shape[-1], ids.reshape(-1)
        rows = x.repeat_interleave(k, 0)
        g, u = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[flat], (nn.functional.silu(g) * u).unsqueeze(-1)).squeeze(-1)
        return (y * w.reshape(-1, 1)).view(-1, k, self.shape.hidden).sum(1).to(x.dtype)


@dataclass
class Cell:
    """One shape, number of tokens and share of identity experts.

    Attributes:
        share: Of the slots of the timed calls that went to identity experts.
        rows: Mean rows of a call that reached the kernel, with the pass and without.
        flops: Of those rows' GEMMs.
        seconds: Medians, with the pass and without.
        error: Largest difference of the two results over the largest value.
    """

    shape: str
    tokens: int
    share: float
    rows: dict[str, float]
    flops: dict[str, float]
    seconds: dict[str, float]
    rounds: int
    error: float

    @property
    def speedup(self) -> float:
        """How many times as fast the layer is with the pass."""
        return self.seconds["without"] / self.seconds["with"]


class RowCount:
    """Counts the rows of every call of a kernel."""

    def __init__(self) -> None:
        self.last = 0
        forward = CpuExperts.forward

        def counted(kernel: CpuExperts, inputs: list[Tensor]) -> list[Tensor]:
            ids = inputs[1]
            self.last = int(((ids >= 0) & (ids < kernel.shape.experts)).sum())
            return forward(kernel, inputs)

        CpuExperts.forward = counted  # type: ignore[method-assign]


def draw(shape: Shape, tokens: int, zeros: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices of k out of E + ``zeros`` experts, all alike, and weights."""
    ids = torch.rand(tokens, shape.experts + zeros).topk(shape.top_k).indices
    return torch.randn(tokens, shape.hidden).to(dtype), ids, torch.softmax(torch.randn(tokens, shape.top_k), -1)


def variants(layer: Layer, inner: str) -> dict[str, Callable[..., Tensor]]:
    """The layer compiled with the pass and without.

    Raises:
        SystemExit: The two programs do not differ in the pass alone.
    """
    without = ",".join(p for p in PIPELINES["default"].split(",") if p != PASS)
    if without == PIPELINES["default"]:
        raise SystemExit(f"the default pipeline has no {PASS}")
    common = {"inner": inner, "backends": ["cpu"], "checks": "strict"}
    return {
        name: torch.compile(layer, backend="moec", dynamic=True, options={**common, "passes": passes})
        for name, passes in (("with", "default"), ("without", without))
    }


def measure(
    shape: Shape, dtype: torch.dtype, calls: dict[str, Callable[..., Tensor]], tokens: int, zeros: int,
    seconds: float, count: RowCount,
) -> Cell:  # fmt: skip
    """Times one cell.

    Raises:
        SystemExit: The results differ, or rows do not fall by the identity experts' slots.
    """
    got = {name: call(*inputs) for inputs in [draw(shape, tokens, zeros, dtype)] for name, call in calls.items()}
    difference = (got["with"].float() - got["without"].float()).abs().max() / got["without"].float().abs().max()
    if not difference <= TOLERANCE:
        raise SystemExit(f"{shape.name}, {tokens} tokens: the results differ by {difference:.1e}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    rows: dict[str, list[int]] = {name: [] for name in calls}
    slots, names, turn = 0, list(calls), 0
    stop = time.perf_counter() + seconds
    while turn < FEWEST_ROUNDS or time.perf_counter() < stop:
        x, ids, w = draw(shape, tokens, zeros, dtype)
        live = int((ids < shape.experts).sum())
        slots += live
        for name in names[turn % 2 :] + names[: turn % 2]:
            start = time.perf_counter()
            calls[name](x, ids, w)
            times[name].append(time.perf_counter() - start)
            rows[name].append(count.last)
        if rows["with"][-1] != live or rows["without"][-1] != ids.numel():
            raise SystemExit(
                f"{live} of {ids.numel()} slots have an expert, {rows['with'][-1]} rows reached the kernel"
            )
        turn += 1
    mean = {name: statistics.mean(r) for name, r in rows.items()}
    return Cell(
        shape.name, tokens, 1 - slots / (turn * tokens * shape.top_k), mean,
        {name: 6 * r * shape.hidden * shape.inner for name, r in mean.items()},
        {name: statistics.median(t) for name, t in times.items()}, turn, float(difference),
    )  # fmt: skip


def table(cells: list[Cell]) -> Table:
    """A row for each cell."""
    out = Table(title=f"{PASS}: rows and times of a layer without it and with it")
    columns = (
        "layer",
        "T",
        "identity slots",
        "rows",
        "with",
        "GFLOP",
        "with",
        "ms",
        "with",
        "times as fast",
        "difference",
    )
    for column in columns:
        out.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for c in cells:
        pairs = ((c.rows, 1.0, ".0f"), (c.flops, 1e-9, ".1f"), (c.seconds, 1e3, ".1f"))
        numbers = [f"{v[name] * scale:{form}}" for v, scale, form in pairs for name in ("without", "with")]
        out.add_row(
            c.shape, str(c.tokens), f"{c.share:.1%}", *numbers, f"{c.speedup:.2f}", f"{c.error:.0e}"
        )  # fmt: skip
    return out


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", default="longcat-32,small", help=f"of {', '.join(LAYERS)}, separated by commas")
    add("--tokens", default="16,64,256,1024", help="token counts, separated by commas")
    add("--share", default="0.25,0.33,0.5", help="shares of identity experts among those that can be chosen")
    add("--dtype", default="bf16", choices=sorted(DTYPES))
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, default=4.0, help="for each cell; at least three rounds are taken")
    add("--inner", default="eager", choices=("eager", "inductor"), help="what compiles the term beside the experts")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.shapes = args.shapes.split(",")
    if unknown := [s for s in args.shapes if s not in LAYERS]:
        parser.error(f"--shapes {unknown[0]}: choose of {', '.join(LAYERS)}")
    try:
        args.share = [float(s) for s in args.share.split(",")]
    except ValueError:
        parser.error(f"--share {args.share}: give numbers, separated by commas")
    if not all(0 < s < 1 for s in args.share):
        parser.error("--share: give numbers between 0 and 1")
    return args


def main() -> None:
    """Reads the command line, measures, prints."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    screen, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 160)
    dtype, tokens, cells, count = DTYPES[args.dtype], parse_tokens(args.tokens), list[Cell](), RowCount()
    with torch.no_grad():
        for name in args.shapes:
            shape = LAYERS[name]
            torch._dynamo.reset()
            calls = variants(Layer(shape, dtype), args.inner)
            for share in args.share:
                zeros = max(1, round(shape.experts * share / (1 - share)))
                for t in tokens:
                    cells.append(measure(shape, dtype, calls, t, zeros, args.seconds, count))
                    screen.print(f"{name}, T = {t}, {share:.0%}: {cells[-1].speedup:.2f}", highlight=False)
    if args.json:
        found = [{**asdict(c), "speedup": c.speedup} for c in cells]
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "cells": found}, indent=1) + "\n", encoding="utf-8"
        )
    out.print(table(cells))


if __name__ == "__main__":
    main()
