"""The model's tiles against a sweep of compiled ones: registers, spills, shared memory, and the time they give.

For every case (layer, GPU, tokens) the tiles that the model ranks best are compiled for the up GEMM, and their times
are predicted once more with what the compiler really took. The table says how far the model's choice is from the best.

    python benchmarks/triton_sweep.py --cases 40 --tiles 4
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import asdict, dataclass, replace

import numpy as np

from moec.backends.base import program_op
from moec.backends.triton.compiled.cross import compile_kernel
from moec.backends.triton.compiled.resources import Resources
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launches.choose import load_of, pick
from moec.backends.triton.launches.device import Device, device_of
from moec.backends.triton.launches.gemm_time import times
from moec.backends.triton.launches.launch import layer_of
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.launches.usage import tiles_for, usage
from moec.backends.triton.module import load_module
from moec.backends.triton.spec import Spec, read_spec
from moec.ir.parser import parse_graph

LAYERS = {
    "OLMoE": (2048, 1024, 64, 8), "Qwen3-30B-A3B": (2048, 768, 128, 8), "gpt-oss-20b": (2880, 2880, 32, 4),
    "Mixtral-8x7B": (4096, 14336, 8, 2), "DeepSeek-V3": (7168, 2048, 256, 8),
}  # fmt: skip
TARGETS = ("cuda:sm80", "cuda:sm90", "cuda:sm100", "hip:gfx942")
TOKENS = (64, 1024, 4096, 16384)
_TEXT = """
graph @layer(%x: bf16[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}], %up: bf16[{e}, {ii}, {h}],
             %down: bf16[{e}, {h}, {i}]) -> bf16[T, {h}] {{
  %y = moe.experts %x, %ids, %w, [%up], [%down] {{experts = {e}}} {{
    (%g: bf16[R, {i}], %u: bf16[R, {i}]) -> bf16[R, {i}] {{
      %s = torch.call @aten.silu.default(%g) : bf16[R, {i}]
      %m = torch.call @aten.mul.Tensor(%s, %u) : bf16[R, {i}]
      return %m
    }}
  }} : bf16[T, {h}]
  return %y
}}
"""


@dataclass(frozen=True)
class Result:
    """One tile of a case, as expected and as compiled."""

    layer: str
    target: str
    tokens: int
    chosen: bool
    tile: str
    registers: int
    expected_registers: int
    shared: int
    expected_shared: int
    spills: int
    occupancy: int
    predicted_us: float
    with_compiled_us: float


def spec_of(name: str) -> Spec:
    """A layer's kernels."""
    h, i, e, k = LAYERS[name]
    return read_spec(program_op(parse_graph(_TEXT.format(h=h, i=i, ii=2 * i, e=e, k=k))))


def compiled(spec: Spec, device: Device, tile: Tile) -> Resources:
    """What the up kernel takes with this tile."""
    file = write_experts(spec)
    kernel = file.kernels["up"]
    signature = {a.name: a.type for a in kernel.arguments} | dict.fromkeys(kernel.constants, "constexpr")
    tma = isinstance(device.arch, int) and device.arch >= 90
    known = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
        "TMA": int(tma),
    }  # fmt: skip
    constants = {c: known[c] for c in kernel.constants}
    aligned = frozenset(a.name for a in kernel.arguments if a.type != "i32")
    function = load_module(file.text).up
    return compile_kernel(
        function, signature, constants, device, warps=tile.num_warps, stages=tile.num_stages, aligned=aligned
    ).resources


def study(name: str, target: str, tokens: int, most: int) -> list[Result]:
    """The model's choice and the next best tiles of a case."""
    spec, device = spec_of(name), device_of(target)
    layer = layer_of(spec)
    gemm, load = layer.gemms[0], load_of(layer, tokens)
    table = tiles_for(device, gemm.parts, gemm.dtype)
    found = times(gemm, load, device, table)
    choice = pick(layer, tokens, device)
    own = next(i for i, t in enumerate(table.tiles) if replace(t, group_m=choice.up.group_m) == choice.up)
    order = [own, *(int(i) for i in np.lexsort((found.unit, found.seconds)) if i != own)][:most]
    results = []
    for at in order:
        tile = replace(table.tiles[at], group_m=choice.up.group_m)
        taken, expected = compiled(spec, device, tile), usage(device, tile, gemm.parts, gemm.dtype)
        really = replace(table, resident=np.full(len(table.tiles), float(max(1, taken.occupancy))))
        seconds = float(times(gemm, load, device, really).seconds[at]) if not taken.spills else float("inf")
        results.append(
            Result(
                name, target, tokens, at == own, f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.num_warps}w "
                f"{tile.num_stages}s", taken.registers, expected.registers, taken.shared, expected.shared,
                taken.spills, taken.occupancy, float(found.seconds[at]) * 1e6, seconds * 1e6,
            )
        )  # fmt: skip
    return results


def main() -> None:
    """Print a line for every case, and what they come to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--tiles", type=int, default=4, help="compiled in each case")
    parser.add_argument("--json", help="write every tile to this file")
    args = parser.parse_args()
    cases = list(itertools.product(LAYERS, TARGETS, TOKENS))
    random.Random(0).shuffle(cases)
    everything, losses = [], []
    print("| layer | GPU | tokens | tile of the model | registers (expected) | spills | shared | from the best |")
    print("|---|---|---|---|---|---|---|---|")
    for name, target, tokens in cases[: args.cases]:
        results = study(name, target, tokens, args.tiles)
        everything += results
        own, best = results[0], min(r.with_compiled_us for r in results)
        losses.append(own.with_compiled_us / best - 1)
        print(
            f"| {name} | {target} | {tokens} | {own.tile} | {own.registers} ({own.expected_registers}) | {own.spills} "
            f"| {own.shared} | {losses[-1]:+.1%} |",
            flush=True,
        )
    spilled = sum(r.spills > 0 for r in everything)
    print(f"\n{len(losses)} cases, {len(everything)} tiles, {spilled} of them spill; the choices spill in ", end="")
    print(f"{sum(r.spills > 0 for r in everything if r.chosen)}; from the best at most {max(losses):.1%}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump([asdict(r) for r in everything], f, indent=1)


if __name__ == "__main__":
    main()
