"""The cost model against the clock: layers that no calibration has seen, predicted and measured.

    python benchmarks/cost_model.py [--cases 60] [--threads 2] [--seed 0] [--skew 0] [--defaults] [--picture FILE.png]

Layers are drawn at random (sizes of real models and others between them, bf16 and f32), three numbers of tokens each.
Router choices change from call to call and sets of weights take turns, 1 GB or more, so that weights come from memory.
A time is the median of calls that no other work interrupted, as far as there were such. The profile is the one that
`moec profile` stored; ``--defaults`` takes the assumed numbers instead. With ``--skew`` choices follow a Zipf
distribution, and the model is given each call's histogram; otherwise it is given the number of tokens.

The memory of a virtual machine is shared with its neighbours, and what they leave changes within minutes. So a call of
the profile's own kind (one row an expert) is timed before and after every layer's cases, and the model is told how much
slower or faster memory is than when the profile was taken (``--as-profiled`` leaves that out).

Prints the mean absolute error in percent of the measured time, the five worst cases, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moec.calibration.layers import SyntheticLayer
from moec.calibration.picture import require_matplotlib
from moec.calibration.times import take_times
from moec.cost import LayerShape, MachineProfile, defaults_for, machine_for, predict
from moec.targets import parse_target

HIDDEN = (768, 1024, 1536, 2048, 2560, 2880, 3072, 4096, 5120)
INNER = (256, 384, 512, 640, 768, 1024, 1408, 1536, 2048, 2880, 4096, 6400)
EXPERTS = (8, 16, 32, 60, 64, 128, 256)
TOP_K = (1, 2, 4, 6, 8)
TOKENS = (1, 2048)
PER_LAYER = 3
LEAST_BYTES, MOST_BYTES, MOST_FLOPS = 0.3e9, 1.5e9, 0.25e12
TOGETHER = 1.0e9  # bytes of weights that take turns
REFERENCE_EXPERTS, REFERENCE_CALLS = 24, 9
SECONDS = 0.5  # of calls for one case


@dataclass(frozen=True)
class Case:
    """One prediction and its measurement, seconds."""

    shape: LayerShape
    tokens: int
    predicted: float
    measured: float
    bound: str

    @property
    def error(self) -> float:
        """Relative to the measured time; above zero the model is too slow."""
        return self.predicted / self.measured - 1


def draw_layer(rng: random.Random, dtype: str) -> LayerShape:
    """A layer that fits in memory and not in a cache."""
    while True:
        h, e, k = rng.choice(HIDDEN), rng.choice(EXPERTS), rng.choice(TOP_K)
        shape = LayerShape(h, rng.choice(INNER), h, e, k, dtype=dtype)
        if LEAST_BYTES <= e * shape.elements * shape.item <= MOST_BYTES and k < e:
            return shape


def draw_tokens(rng: random.Random, shape: LayerShape) -> list[int]:
    """Numbers of tokens, evenly on a logarithmic scale."""
    most = min(TOKENS[1], int(MOST_FLOPS / (2 * shape.top_k * shape.elements)))
    return sorted(round(TOKENS[0] * (most / TOKENS[0]) ** rng.random()) for _ in range(PER_LAYER))


@dataclass(frozen=True)
class Call:
    """Seconds of a call, and the rows that its experts got; None for uniform choices."""

    seconds: float
    load: list[int] | None


def measure_times(layer: SyntheticLayer, tokens: int, skew: float) -> list[Call]:
    """Calls that nothing interrupted, as far as there were such."""
    shape = layer.shape
    popularity = torch.arange(1, shape.experts + 1, dtype=torch.float32).pow(-skew).log()
    x = layer.tokens(tokens)
    made: list[Call] = []

    def call(_: int) -> float:
        ids = (popularity - torch.empty(tokens, shape.experts).exponential_().log()).topk(shape.top_k).indices
        load = torch.bincount(ids.flatten(), minlength=shape.experts).tolist() if skew else None
        made.append(Call(layer.seconds(x, ids), load))
        return made[-1].seconds

    calls = max(5, min(40, int(SECONDS / max(call(0), call(0)))))
    times = take_times(call, calls)
    kept = set(times.clean or times.interrupted)
    return [c for c in made if c.seconds in kept]


def judge(shape: LayerShape, tokens: int, calls: list[Call], machine: MachineProfile, threads: int) -> Case:
    """Medians of what was measured and of what is predicted for it."""
    measured = statistics.median(c.seconds for c in calls)
    told = [predict(shape, tokens if c.load is None else c.load, machine, threads).seconds for c in calls]
    bound = predict(shape, tokens, machine, threads).bound
    return Case(shape, tokens, statistics.median(told), measured, bound)


class Memory:
    """How fast weights are read now, by a call that the profile's curve has a point for."""

    def __init__(self, machine: MachineProfile, threads: int) -> None:
        self.shape = LayerShape(2048, 1024, 2048, experts=96, top_k=1)
        self.layer, self.threads = SyntheticLayer(self.shape, least_bytes=TOGETHER), threads
        self.expected = predict(self.shape, self._load(), machine, threads).seconds

    def _load(self) -> list[int]:
        return [1] * REFERENCE_EXPERTS + [0] * (self.shape.experts - REFERENCE_EXPERTS)

    def seconds(self) -> float:
        """Of one reference call, median."""
        times = self.layer.fixed_rows(1, REFERENCE_EXPERTS, self.threads, REFERENCE_CALLS)
        return statistics.median(times.clean or times.interrupted)


def draw_picture(cases: list[Case], error: float, path: Path) -> None:
    """Predicted against measured, one point a case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.add_subplot()
    for bound in ("memory", "compute", "overhead"):
        points = [(c.measured * 1e3, c.predicted * 1e3) for c in cases if c.bound == bound]
        if points:
            axes.scatter(*zip(*points, strict=True), s=18, label=f"bound by {bound}")
    ends = [f(c.measured * 1e3 for c in cases) for f in (min, max)]
    axes.plot(ends, ends, "k-", linewidth=0.8)
    for factor in (0.9, 1.1):
        axes.plot(ends, [factor * e for e in ends], "k:", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    axes.set_title(f"{len(cases)} layers, mean absolute error {error:.1%} (dotted: 10 %)")
    axes.legend()
    figure.savefig(path, dpi=120)


def print_cases(title: str, cases: list[Case], console: Console) -> None:
    """A table of cases."""
    table = Table(title=title, title_justify="left")
    for column in ("H", "I", "E", "k", "type", "T", "predicted, ms", "measured, ms", "error", "bound by"):
        table.add_column(column, justify="right")
    for c in cases:
        s = c.shape
        sizes = (s.hidden, s.inner, s.experts, s.top_k, s.dtype, c.tokens)
        times = (f"{c.predicted * 1e3:.3g}", f"{c.measured * 1e3:.3g}", f"{c.error:+.1%}", c.bound)
        table.add_row(*map(str, sizes), *times)
    console.print(table)


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, default=0.0, help="exponent of a Zipf distribution over experts")
    parser.add_argument("--dtypes", default="bf16,f32", help="element types, in turn")
    parser.add_argument("--defaults", action="store_true", help="assumed numbers in place of the stored profile")
    parser.add_argument("--as-profiled", action="store_true", help="memory is taken to be as fast as in the profile")
    parser.add_argument("--all", action="store_true", help="print every case")
    parser.add_argument("--picture", type=Path, help="draw predicted against measured (PNG)")
    args = parser.parse_args()
    if args.picture:
        require_matplotlib()
    target = parse_target("cpu")
    machine = defaults_for(target) if args.defaults else machine_for(target)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, dtypes = random.Random(args.seed), args.dtypes.split(",")
    layers = [draw_layer(rng, dtypes[i % len(dtypes)]) for i in range(-(-args.cases // PER_LAYER))]
    cases: list[Case] = []
    memory, factors = Memory(machine, args.threads), list[float]()
    with torch.no_grad():
        for shape in track(layers, description="measuring", console=Console(stderr=True), transient=True):
            layer = SyntheticLayer(shape, least_bytes=TOGETHER)
            before = memory.seconds()
            found = [(t, measure_times(layer, t, args.skew)) for t in draw_tokens(rng, shape)]
            factor = 1.0 if args.as_profiled else memory.expected / statistics.mean([before, memory.seconds()])
            factors.append(factor)
            cases += [judge(shape, t, times, machine.with_memory(factor), args.threads) for t, times in found]
            del layer
    error = statistics.mean(abs(c.error) for c in cases)
    console = Console()
    if args.all:
        print_cases("all cases", cases, console)
    print_cases("the five worst", sorted(cases, key=lambda c: -abs(c.error))[:5], console)
    source = f"measured {machine.measured}" if machine.calibrated else "assumed"
    console.print(
        f"{len(cases)} cases, {args.threads} threads, profile {source}: mean absolute error {error:.1%}, "
        f"mean error {statistics.mean(c.error for c in cases):+.1%}, "
        f"within 10 %: {sum(abs(c.error) <= 0.1 for c in cases)}; "
        f"memory at {min(factors):.2f} to {max(factors):.2f} of the profile's speed"
    )
    if args.picture:
        draw_picture(cases, error, args.picture)
    print(json.dumps({"threads": args.threads, "mape": error, "cases": [asdict(c) for c in cases]}))


if __name__ == "__main__":
    main()
