"""What overlap hides, measured: layers on ranks that are processes, over links with injected delays.

    python benchmarks/overlap.py --ranks 2 --compute cpu
    python benchmarks/overlap.py --ranks 4 --compute sleep

Every rank has one thread. Rows travel by gloo, and come when the links of the cost model would have brought them
(moec.testing); waiting takes no processor. Experts are the cpu backend's kernels, timed here before, or sleep as long
as a curve says, so that more ranks than cores can be measured. For several ratios of the experts' time to the links'
the table shows the step (forward or backward of one layer, slowest rank, median) without overlap, in two equal chunks,
and as the pass chooses, beside what was predicted; and the communication that was not hidden beside what no order could
hide.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.backends.base import Artifact, Kernel
from moec.backends.distributed import groups
from moec.backends.distributed.kernel import ParallelKernel, local_program
from moec.backends.registry import get_backend
from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.cost.machine import rising
from moec.ir.core import Graph, Op
from moec.ir.parser import parse_graph
from moec.passes import PassContext, PassManager
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.plan import plan, read_layer
from moec.passes.overlap.policies import Schedule, uncut
from moec.runtime.programs import program_graph
from moec.testing import SleepingLayer, delayed_group

RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
POLICIES = ("none", "two", "auto")
DIRECTIONS = ("forward", "backward")
ALPHA = 5e-4
SKEW = 1.0
BACKWARD = 8 / 3
"""Work of a backward over that of a forward: the up GEMM again, and two GEMMs for each of the three matrices' one."""

TEXT = """
graph @layer(%x: {d}[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}], %up: {d}[{own}, {i2}, {h}], %down: {d}[{own}, {h}, {i}]) -> {d}[T, {h}] {{
  %a = comm.all_gather.start %up {{group = "ep", ranks = {n}, sizes = {sizes}}} : !comm.token
  %ups = comm.wait %a : {d}[{e}, {i2}, {h}]
  %b = comm.all_gather.start %down {{group = "ep", ranks = {n}, sizes = {sizes}}} : !comm.token
  %downs = comm.wait %b : {d}[{e}, {h}, {i}]
  %y = moe.experts %x, %ids, %w, [%ups], [%downs] {{experts = {e}}} {{
    @activation(%g: {d}[R, {i}], %u: {d}[R, {i}]) -> {d}[R, {i}] {{
      %s = torch.call @aten.silu.default(%g) : {d}[R, {i}]
      %m = torch.call @aten.mul.Tensor(%s, %u) : {d}[R, {i}]
      return %m
    }}
  }} : {d}[T, {h}]
  return %y
}}
"""  # noqa: E501


@dataclass(frozen=True)
class Sizes:
    """One layer: widths, experts and choices a token, tokens of a rank."""

    ranks: int
    hidden: int
    inner: int
    experts: int = 16
    top_k: int = 2
    tokens: int = 1024
    dtype: str = "f32"

    def graph(self) -> Graph:
        """A rank's part, weights gathered as the model says it."""
        own = self.experts // self.ranks
        return parse_graph(
            TEXT.format(
                d=self.dtype, h=self.hidden, k=self.top_k, i=self.inner, i2=2 * self.inner, e=self.experts, own=own,
                n=self.ranks, sizes=(own,) * self.ranks,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """The cost model that passes are given."""

    curve: LayerCurve
    backward_curve: LayerCurve
    link: Link

    def expert_times(self, op: Op, backward: bool = False) -> LayerCurve:
        return self.backward_curve if backward else self.curve

    def transport(self, group: str, ranks: int) -> Link:
        return self.link


@dataclass(frozen=True)
class Loads:
    """The routing profile: the very rows of the step."""

    table: list[list[float]]

    def rows(self, module: str, ranks: int, experts: int) -> list[list[float]]:
        return self.table


def routes(sizes: Sizes, zipf: bool) -> list[Tensor]:
    """The chosen experts of every rank's tokens, i64[T, k]: evenly, or by Zipf's law over shuffled experts."""
    found = []
    place = torch.randperm(sizes.experts, generator=torch.Generator().manual_seed(3))
    odds = (place + 1.0) ** (-SKEW if zipf else 0.0)
    for rank in range(sizes.ranks):
        gen = torch.Generator().manual_seed(rank)
        if zipf:
            found.append(torch.multinomial(odds.expand(sizes.tokens, -1), sizes.top_k, generator=gen))
        else:
            slots = torch.arange(sizes.tokens * sizes.top_k).view(sizes.tokens, sizes.top_k)
            found.append((slots + rank) % sizes.experts)
    return found


def table(sizes: Sizes, ids: list[Tensor]) -> list[list[float]]:
    return [torch.bincount(i.flatten(), minlength=sizes.experts).double().tolist() for i in ids]


def asleep() -> tuple[LayerCurve, LayerCurve]:
    """Curves of emulated experts: reading weights 4 ms, 45 µs a row, 0.5 ms a call."""
    points = tuple((float(r), (0.004**2 + (4.5e-5 * r) ** 2) ** 0.5) for r in (1, 16, 32, 64, 96, 128, 256, 512, 1024))
    curve = LayerCurve(5e-4, points)
    return curve, curve.times(BACKWARD)


def timed(call: Any, seconds: float = 0.25) -> float:
    """Seconds of a call: median."""
    call()
    took: list[float] = []
    end = time.monotonic() + seconds
    while len(took) < 3 or time.monotonic() < end:
        start = time.monotonic()
        call()
        took.append(time.monotonic() - start)
    return statistics.median(took)


def measured(layer: Op, sizes: Sizes, weights: list[Tensor]) -> tuple[LayerCurve, LayerCurve]:
    """Curves of the cpu backend's kernels, with as many experts as a rank has, while other ranks measure too."""
    inner = next(op for op in layer.regions[0].ops if op.name == "moe.experts")
    program = local_program(inner, inner.result.type)
    backend = get_backend("cpu")
    kernel: Kernel = backend.load(backend.lower(program, "cpu"))
    own = sizes.experts // sizes.ranks
    curves = []
    for backward in (False, True):
        points: list[tuple[int, float]] = []
        launch = 0.0
        for rows in (0, 1, 8, 32, 64, 128, 256, 512):
            some = min(own, 2) if rows else own
            ids = torch.arange(some).repeat_interleave(max(rows, 1))[:, None]
            ids = ids[:1] if not rows else ids
            x = torch.randn(len(ids), sizes.hidden).to(weights[0].dtype)
            ones = torch.ones(len(ids), 1)
            given = [x, ids, ones, *weights]

            def call(given: list[Tensor] = given, x: Tensor = x, backward: bool = backward) -> None:
                if backward:
                    kernel.backward([x], given, [True, False, True, True, True])
                else:
                    kernel.forward(given)

            took = timed(call)
            if rows:
                points.append((rows, max(1e-9, (took - launch) / some)))
            elif backward:  # gradients of all experts' weights are written, whoever has rows
                launch = took * 0.5
        curves.append(LayerCurve(launch, tuple((float(r), s) for r, s in rising(points))))
    return curves[0], curves[1]


def link_for(layer: Layer, ratio: float) -> Link:
    """Links that the uncut layer's experts take ``ratio`` times as long as."""
    whole = uncut(layer).chunks[0]
    there = Layer(layer.rows, layer.sizes, layer.experts, Link(0, 1), 1.0, 0.0, 1, 1, 0)
    rows = uncut(there).chunks[0].there
    messages = layer.there_messages + layer.back_messages + layer.count_messages
    wire = max(whole.compute) / ratio - messages * ALPHA
    return Link(ALPHA, rows * (layer.there_bytes + layer.back_bytes) / wire)


@dataclass
class Row:
    """One line of the table; seconds."""

    ratio: float
    routing: str
    direction: str
    policy: str
    chunks: str
    predicted: float
    step: float
    compute: float
    floor: float

    @property
    def exposed(self) -> float:
        return self.step - self.compute


def one_case(rank: int, sizes: Sizes, args: argparse.Namespace, ratio: float, zipf: bool, place: int) -> list[Row]:
    """All policies of one ratio, routing and direction."""
    ids = routes(sizes, zipf)
    profile = Loads(table(sizes, ids))
    gen = torch.Generator().manual_seed(rank)
    own, wide = sizes.experts // sizes.ranks, {"f32": torch.float32, "bf16": torch.bfloat16}[sizes.dtype]
    weights = [
        torch.randn(own, 2 * sizes.inner, sizes.hidden, generator=gen).to(wide) * sizes.hidden**-0.5,
        torch.randn(own, sizes.hidden, sizes.inner, generator=gen).to(wide) * sizes.inner**-0.5,
    ]
    x = torch.randn(sizes.tokens, sizes.hidden, generator=gen).to(wide)
    inputs = [x, ids[rank], torch.rand(sizes.tokens, sizes.top_k, generator=gen), *weights]
    spread = sizes.graph()
    PassManager("expert-parallel", repro=None).run(spread, PassContext())
    if (curves := _CURVES.get(sizes)) is None:
        if args.compute == "sleep":
            curves = asleep()
        else:
            dist.barrier()
            mine = measured(spread.ops[0], sizes, weights)
            everyone: list[Any] = [None] * sizes.ranks
            dist.all_gather_object(everyone, mine)
            curves = everyone[0]  # all plan with the same numbers
        _CURVES[sizes] = curves
    first = Costs(*curves, Link(ALPHA, 1e9))
    layer = read_layer(spread.ops[0], place, PassContext(cost_model=first, profile=profile))
    link = link_for(layer, ratio)
    costs = Costs(*curves, link)
    ctx = PassContext(cost_model=costs, profile=profile)
    layer = read_layer(spread.ops[0], place, ctx)
    pg = delayed_group(link)
    groups.clear()
    groups.bind("ep", pg)
    found: list[Row] = []
    kernels: dict[str, tuple[ParallelKernel, Schedule]] = {}
    for policy in POLICIES:
        graph = spread.clone()
        if policy != "none":
            PassManager(f"overlap{{policy={policy}}}", repro=None).run(graph, ctx)
        op = graph.ops[0]
        op.attrs["backend"] = "cpu" if args.compute == "cpu" else "aten"
        kernel = (
            SleepingLayer(program_op(op), "cpu", *curves)
            if args.compute == "sleep"
            else ClockedLayer(program_op(op), "cpu")
        )
        kernels[policy] = kernel, plan(layer, place, policy)
    steps: dict[str, list[float]] = {p: [] for p in POLICIES}
    computed: dict[str, list[float]] = {p: [] for p in POLICIES}
    for turn in range(args.turns + 1):
        for policy, (kernel, _) in kernels.items():
            dist.barrier()
            start = time.monotonic()
            if place:
                kernel.backward([x], inputs, [True, False, True, True, True])
            else:
                kernel.forward(inputs)
            end = time.monotonic()
            told: list[Any] = [None] * sizes.ranks
            dist.all_gather_object(told, (start, end, kernel.computed))
            if turn:
                steps[policy].append(max(e for _, e, _ in told) - min(s for s, _, _ in told))
                computed[policy].append(max(c for _, _, c in told))
    for policy, (_, schedule) in kernels.items():
        sizes_text = f"{len(schedule.chunks)} {schedule.along}" if schedule.cut else "1"
        found.append(
            Row(
                ratio, "zipf" if zipf else "balanced", DIRECTIONS[place], policy, sizes_text, schedule.seconds,
                statistics.median(steps[policy]), statistics.median(computed[policy]), schedule.floor,
            )
        )  # fmt: skip
    pg.shutdown()
    return found


_CURVES: dict[Sizes, tuple[LayerCurve, LayerCurve]] = {}


class ClockedLayer(ParallelKernel):
    """A layer that knows how long its experts took in the last call."""

    computed = 0.0

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        self.computed = 0.0
        return super().forward(inputs)

    def backward(self, grads: Any, inputs: list[Tensor], needs: Any) -> list[Tensor | None]:
        self.computed = 0.0
        return super().backward(grads, inputs, needs)

    def _experts(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        start = time.monotonic()
        found = super()._experts(op, inputs)
        self.computed += time.monotonic() - start
        return found

    def _experts_backward(self, op: Op, inputs: list[Tensor]) -> list[Tensor]:
        start = time.monotonic()
        found = super()._experts_backward(op, inputs)
        self.computed += time.monotonic() - start
        return found


def program_op(op: Op) -> Op:
    """The layer as an op of a program of its own."""
    graph = Artifact("distributed", "cpu", program_graph(op)).graph
    return next(o for o in graph.ops if o.name == "moe.parallel_experts")


def rank_main(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    small = args.compute == "sleep"
    sizes = Sizes(args.ranks, 64 if small else 512, 16 if small else 512, tokens=args.tokens)
    found = []
    for place in (DIRECTIONS.index(d) for d in args.directions):
        for zipf in (False, True):
            for ratio in args.ratios:
                found += one_case(rank, sizes, args, ratio, zipf, place)
                if rank == 0:
                    show(found[-len(POLICIES) :])
    if rank == 0:
        verdict(found)
        if args.json:
            args.json.write_text(json.dumps([vars(r) for r in found], indent=1), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def show(rows: list[Row]) -> None:
    for r in rows:
        print(
            f"| {r.ratio:g} | {r.routing} | {r.direction} | {r.policy} | {r.chunks} | {r.step * 1e3:.1f} "
            f"| {r.predicted * 1e3:.1f} | {r.step / r.predicted - 1:+.1%} "
            f"| {r.exposed * 1e3:.1f} | {r.floor * 1e3:.1f} |",
            flush=True,
        )


def verdict(rows: list[Row]) -> None:
    """How the schedules that the pass chose hold against their promises."""
    mine = [r for r in rows if r.policy == "auto"]
    none = {(r.ratio, r.routing, r.direction): r for r in rows if r.policy == "none"}
    off = max(abs(r.step / r.predicted - 1) for r in mine)
    exposed = max((r.exposed - 1.1 * r.floor) / r.step for r in mine)
    slower = max(r.step / none[r.ratio, r.routing, r.direction].step for r in mine)
    gain = statistics.mean(none[r.ratio, r.routing, r.direction].step / r.step for r in mine)
    print(f"\nstep against prediction, worst: {off:.1%}")
    print(f"exposed beyond 1.1 times the floor, worst, of the step: {exposed:.1%}")
    print(f"step over that without overlap: worst {slower:.3f}, mean speed-up {gain:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--compute", choices=("sleep", "cpu"), default="sleep")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--ratios", type=lambda s: [float(r) for r in s.split(",")], default=list(RATIOS))
    parser.add_argument("--directions", type=lambda s: s.split(","), default=list(DIRECTIONS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    print("| experts : links | routing | | policy | chunks | step, ms | predicted | off | exposed | floor |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=rank_main, args=(r, port, args), daemon=True) for r in range(args.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(p.exitcode or 0) for p in ranks))


if __name__ == "__main__":
    main()
