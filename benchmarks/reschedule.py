"""Regrouping the tokens of two micro-batches: what it saves on real routing, and what it does to a layer's time.

    python benchmarks/reschedule.py routing
    python benchmarks/reschedule.py layer --threads 2

``routing`` trains a tiny language model (``tiny_lm.py``), records its routers on text that it has not seen, and lets
two micro-batches of neighbouring tokens share them. ``layer`` times a layer of Qwen3-30B-A3B's sizes on the cpu
backend, two calls of T / 2 tokens each: as the tokens come, and regrouped, plan and gathers included. Its tokens have
planted clusters: each of some kinds of tokens has experts of its own, and takes one of any kind with a given chance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moec.backends.registry import get_backend
from moec.ir.parser import parse_graph
from moec.routing.profile import RoutingProfile
from moec.routing.record import profile_routing
from ours import Call, Weights, make_weights, moec_calls
from routing import Batch, draw_tokens
from shapes import DTYPES, Shape, parse_shapes, parse_tokens
from tiny_lm import held_out, train, untrained

FEWEST_ROUNDS = 5
PLAN = """
graph @plan(%a: i64[A, k], %b: i64[B, k]) -> (i64[A], i64[B], i64[A], i64[B]) {{
  %p, %q, %r, %s = moe.regroup [%a, %b] {{{attrs}}} : i64[A], i64[B], i64[A], i64[B]
  return %p, %q, %r, %s
}}
"""


@dataclass
class Cell:
    """One number of tokens of a layer.

    Attributes:
        experts: Mean distinct experts, both micro-batches together: as they come, and regrouped.
        seconds: Medians of the layer as the tokens come, of all of it regrouped, and of the plan alone.
        equal: The results of the two have the same bits.
    """

    tokens: int
    clusters: int
    noise: float
    experts: tuple[float, float]
    seconds: dict[str, float]
    rounds: int
    equal: bool


def planted(draw: np.random.Generator, tokens: int, experts: int, top_k: int, clusters: int, noise: float) -> Tensor:
    """int[T, k]: tokens of ``clusters`` kinds in random order, experts of their own kind but for ``noise``."""
    pools = np.array_split(np.arange(experts), clusters)
    rows = []
    for kind in draw.integers(0, clusters, tokens):
        chance = np.full(experts, noise / experts)
        chance[pools[kind]] += (1 - noise) / len(pools[kind])
        rows.append(draw.choice(experts, top_k, replace=False, p=chance / chance.sum()))
    return torch.from_numpy(np.array(rows))


def routing(args: argparse.Namespace) -> tuple[list[object], list[Table]]:
    """Profiles of the model before and after training; tokens as sequences have them, and one of each sequence."""
    model = untrained()
    text = held_out(64, 128)
    calls = list(text.split(8))
    profiles = {"untrained": profile_routing(model, [{"input_ids": x} for x in calls])}
    bits = train(model, args.steps)
    profiles["trained"] = profile_routing(model, [{"input_ids": x} for x in calls])
    title = f"a model of {args.steps} steps, {bits:.2f} bits a byte on unseen text; two micro-batches of T / 2 tokens"
    table = Table(title=title)
    for name in ("model", "layer", "busiest / mean", "SRP(16)", "T", "saved", "by chance", "clusters"):
        table.add_column(name, justify="left" if name in ("model", "layer") else "right")
    for name, profile in profiles.items():
        _add_rows(table, name, profile)
    return [asdict(p) for p in profiles.values()], [table]


def _add_rows(table: Table, name: str, profile: RoutingProfile) -> None:
    for number, layer in enumerate(profile.layers):
        srp = next(value for m, value, _ in layer.srp if m == 16)
        skew = max(layer.loads) * layer.experts / sum(layer.loads)
        for trial in layer.clusters[0].trials:
            table.add_row(
                name, str(number), f"{skew:.2f}", f"{srp:.2f}", str(trial.tokens), f"{trial.saved:.1%}",
                f"{trial.chance:.1%}", "yes" if trial.clustered else "no",
            )  # fmt: skip


def layer(args: argparse.Namespace) -> tuple[list[object], list[Table]]:
    """Times of a layer with and without."""
    torch.set_num_threads(args.threads)
    (shape,), dtype = parse_shapes(args.shape), DTYPES[args.dtype]
    cells = []
    screen = Console(stderr=True)
    call = moec_calls("cpu", f"cpu,cores={args.threads}", args.dtype, shape, [_weights(shape, dtype)])[0]
    draw = np.random.default_rng(0)
    with torch.no_grad():
        for clusters in parse_tokens(args.kinds):
            for tokens in parse_tokens(args.tokens):
                cells.append(_time(shape, dtype, call, draw, tokens, clusters, args.noise, args.seconds))
                screen.print(str(cells[-1]), highlight=False)
    table = Table(title=f"{shape.name}, {args.dtype}, {args.threads} threads; two micro-batches of T / 2 tokens")
    for name in ("kinds", "T", "experts", "regrouped", "ms", "regrouped", "times as fast", "plan, ms", "of a step"):
        table.add_column(name, justify="right")
    for c in cells:
        plain, shared, plan = (c.seconds[name] for name in ("plain", "shared", "plan"))
        table.add_row(
            str(c.clusters), str(c.tokens), f"{c.experts[0]:.0f}", f"{c.experts[1]:.0f}", f"{1e3 * plain:.1f}",
            f"{1e3 * shared:.1f}", f"{plain / shared:.2f}", f"{1e3 * plan:.2f}", f"{plan / shared:.1%}",
        )  # fmt: skip
    return [asdict(c) for c in cells], [table]


def _weights(shape: Shape, dtype: torch.dtype) -> Weights:
    """Seven experts' random numbers, again and again: those of a large layer take minutes to draw."""
    few = make_weights(replace(shape, experts=7), dtype, 1)[0]
    up, down = (torch.empty(shape.experts, *part.shape[1:], dtype=dtype) for part in (few.up, few.down))
    for e in range(shape.experts):
        up[e], down[e] = few.up[e % 7], few.down[e % 7]
    return Weights(up, down)


def _batch(x: Tensor, ids: Tensor, weights: Tensor) -> Batch:
    return Batch(x, ids, ids.to(torch.int32), weights)


def _time(
    shape: Shape, dtype: torch.dtype, call: Call, draw: np.random.Generator, tokens: int, clusters: int, noise: float,
    seconds: float,
) -> Cell:  # fmt: skip
    """Both ways, one after the other, until the time is up."""
    attrs = f"experts = {shape.experts}, expert_bytes = {shape.weight_bytes(dtype, 1)}"
    graph, backend = parse_graph(PLAN.format(attrs=attrs)), get_backend("cpu")
    planner = backend.load(backend.lower(graph, "cpu"))
    half = tokens // 2
    found: dict[str, list[float]] = {"plain": [], "shared": [], "plan": []}
    touched: list[tuple[int, int]] = []
    equal, stop = True, time.perf_counter() + seconds

    def plain(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return torch.cat([call(_batch(x[:half], ids[:half], w[:half])), call(_batch(x[half:], ids[half:], w[half:]))])

    def shared(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        *there, home0, home1 = planner.forward([ids[:half], ids[half:]])
        rows = torch.cat([call(_batch(x[t], ids[t], w[t])) for t in there])
        return torch.cat([rows[home0], rows[home1]])

    def plan(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        there: Tensor = planner.forward([ids[:half], ids[half:]])[0]
        return there

    ways: dict[str, Callable[..., Tensor]] = {"plain": plain, "shared": shared, "plan": plan}
    while len(touched) < FEWEST_ROUNDS or time.perf_counter() < stop:
        ids = planted(draw, tokens, shape.experts, shape.top_k, clusters, noise)
        x, w = draw_tokens(shape, tokens, dtype)
        got = {}
        for name, way in ways.items():
            started = time.perf_counter()
            got[name] = way(x, ids, w)
            found[name].append(time.perf_counter() - started)
        equal &= torch.equal(got["plain"], got["shared"])
        first = got["plan"]
        rest = np.setdiff1d(np.arange(tokens), first.numpy())
        halves = ((ids[:half], ids[half:]), (ids[first], ids[torch.from_numpy(rest)]))
        before, after = (sum(len(part.unique()) for part in parts) for parts in halves)
        touched.append((before, after))
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    means = tuple(statistics.mean(column) for column in zip(*touched, strict=True))
    return Cell(tokens, clusters, noise, (means[0], means[1]), medians, len(touched), equal)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    real = kinds.add_parser("routing", help="what is saved on real routing")
    real.add_argument("--steps", type=int, default=350, help="of training")
    real.set_defaults(run=routing)
    timed = kinds.add_parser("layer", help="what it does to a layer's time")
    timed.add_argument("--shape", default="qwen3-30b", help="a name of shapes.py, or H:I:E:k")
    timed.add_argument("--tokens", default="16,32,64,128,256", help="of both micro-batches together")
    timed.add_argument("--kinds", default="2,8", help="of tokens")
    timed.add_argument("--noise", type=float, default=0.1, help="chance of an expert of any kind")
    timed.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    timed.add_argument("--threads", type=int, default=torch.get_num_threads())
    timed.add_argument("--seconds", type=float, default=4.0, help="for each number of tokens")
    timed.set_defaults(run=layer)
    for command in (real, timed):
        command.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    """Reads the command line, measures, prints."""
    args = arguments()
    found, tables = args.run(args)
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "found": found}, indent=1) + "\n", encoding="utf-8"
        )
    out = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        out.print(table)


if __name__ == "__main__":
    main()
