"""The model's tiles against all tiles of a grid, compiled: registers, spills, shared memory, and the times they give.

``--compile`` compiles both GEMMs, and down as it is where programs share a sum, for every GPU, and notes what each
takes: with what the model chooses, with tiles of a grid, and with tiles drawn from all that the model may choose. So it
does in fp8, where there are GPUs for that, and down as it is where tiles have columns of both halves of the result.
Without it, every case (layer, GPU, tokens, GEMM) is judged by those notes: all tiles are timed with the resident blocks
that the compiler's registers and shared memory leave, and the model's choice is compared with the best.

    python benchmarks/triton_sweep.py --compile
    python benchmarks/triton_sweep.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from moec.backends.base import program_op
from moec.backends.triton.compiled.cross import CrossError, compile_kernel
from moec.backends.triton.compiled.resources import Resources
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launches.choose import load_of, pick
from moec.backends.triton.launches.device import Device, device_of
from moec.backends.triton.launches.gemm_time import times
from moec.backends.triton.launches.launch import layer_of
from moec.backends.triton.launches.table import table_of, tiles_for
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.launches.usage import ITEM_BYTES, Usage, buffers, usage
from moec.backends.triton.module import load_module
from moec.backends.triton.spec import Spec, read_spec
from moec.ir.parser import parse_graph
from moec.ir.scaled_semantics import SCALED

STORED = Path(__file__).parent / "triton_tiles.json"
LAYERS = {
    "OLMoE": (2048, 1024, 64, 8), "Qwen3-30B-A3B": (2048, 768, 128, 8), "gpt-oss-20b": (2880, 2880, 32, 4),
    "Mixtral-8x7B": (4096, 14336, 8, 2), "DeepSeek-V3": (7168, 2048, 256, 8),
}  # fmt: skip
TARGETS = ("cuda:sm80", "cuda:sm90", "cuda:sm100", "hip:gfx942")
TOKENS = (1024, 8192)
EVEN, MASKED = "OLMoE", "gpt-oss-20b"
"""Layers that are compiled: one whose widths are multiples of every tile, and one whose widths are not."""
STEPS = {EVEN: (32, 64), MASKED: (64,)}
KERNELS = ("up", "down")
SHARED, HALVES = "down_parts", "down_halves"
"""Down where programs share the sum of a tile, and where a tile has columns of both halves of the result."""
FP8, FP8_TARGETS = "OLMoE in fp8", ("cuda:sm90", "cuda:sm100")
FP8_LAYERS = tuple(name for name in LAYERS if name != MASKED)
"""Of widths that are whole blocks of scales."""
DRAWN = 16
"""Tiles of each kernel that are drawn."""
_ROWS = [(16, 1), (64, 1), (128, 1), (256, 1), (64, 2), (64, 3), (64, 4), (128, 2)]
_TEXT = """
graph @layer(%x: bf16[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}], %up: bf16[{e}, {ii}, {h}],
             %down: bf16[{e}, {h}, {i}]{more}) -> bf16[T, {h}] {{
  %y = moe.experts %x, %ids, %w, [%up], [%down]{given} {{experts = {e}}} {{
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
class Compiled:
    """A tile of a GEMM as the compiler made it: one without ``registers`` it refused."""

    layer: str
    target: str
    kernel: str
    tile: tuple[int, ...]
    registers: int = 0
    spills: int = 0
    shared: int = 0
    columns: int = 0
    occupancy: int = 0
    mma: str = ""


def spec_of(name: str) -> Spec:
    """A layer's kernels."""
    h, i, e, k = LAYERS[name.removesuffix(" in fp8")]
    text, more, given = _TEXT, "", ""
    if name.endswith(" in fp8"):
        text = text.replace("%up: bf16", "%up: f8e4m3fn").replace("%down: bf16", "%down: f8e4m3fn")
        up, out, inner = (-(-n // SCALED) for n in (2 * i, h, i))
        more, given = f", %us: f32[{e}, {up}, {out}], %ds: f32[{e}, {out}, {inner}]", ", [], [], [], [], [%us], [%ds]"
    return read_spec(program_op(parse_graph(text.format(h=h, i=i, ii=2 * i, e=e, k=k, more=more, given=given))))


def element_of(layer: str) -> str:
    """What the GEMMs of a noted layer multiply."""
    return "f8e4m3fn" if layer == FP8 else "bf16"


def numbers(tile: Tile) -> tuple[int, ...]:
    """What of a tile the compiler sees."""
    return (tile.block_m, tile.units, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)


def tile_of(told: tuple[int, ...]) -> Tile:
    """The tile with such numbers."""
    m, units, n, k, warps, stages = told
    return Tile(m, n, k, 1, warps, stages, units=units)


def parts_of(kernel: str) -> int:
    """Gate and up are multiplied at once, and both halves."""
    return 2 if kernel in ("up", HALVES) else 1


def grid(device: Device, layer: str, kernel: str) -> list[Tile]:
    """Tiles whose operands fit into shared memory and whose sums a block can hold at all, in an order drawn once."""
    found = []
    for (m, units), n, k, warps in itertools.product(_ROWS, (64, 128, 256), STEPS[layer], (4, 8)):
        tile = Tile(m, n, k, 1, warps, 2 if device.hip else 3, units=units)
        outputs = parts_of(kernel) * n
        step = (tile.rows + outputs) * k * ITEM_BYTES["bf16"]
        sums = tile.rows * outputs // (device.warp * warps)
        most = device.thread_registers if not device.tensor_columns else 2 * device.thread_registers
        if buffers(device, tile) * step <= device.shared_block and 4 <= sums <= most:
            found.append(tile)
    random.Random(0).shuffle(found)
    return found


def fp8_grid(device: Device, kernel: str) -> list[Tile]:
    """Tiles whose sums a block can hold twice, and some whose sums it cannot."""
    found = []
    warps = (4, 8) if device.tensor_columns else (4, 8, 16)
    for (m, units), n, w in itertools.product([(32, 1), *_ROWS], (32, 64, 128), warps):
        if 16 <= m * units * n * parts_of(kernel) // (device.warp * w) <= 128:
            found.append(Tile(m, n, SCALED, 1, w, 2, units=units))
    return found


def drawn(device: Device, kernel: str) -> list[Tile]:
    """Tiles that the model may choose, in an order drawn once: other stages than the grid's, narrow ones, deep ones."""
    shapes = [(m, 1) for m in (16, 32, 64, 128, 256)] + [s for s in _ROWS if s[1] > 1]
    whole = list(itertools.product(shapes, (16, 32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)))
    random.Random(2).shuffle(whole)
    splits = (2,) if kernel == SHARED else (1,)
    may = {numbers(t) for t in tiles_for(device, parts_of(kernel), "bf16", splits, gathered=kernel == "up").tiles}
    told = [(*rows, n, k, warps, stages) for rows, n, k, warps, stages in whole]
    return [tile_of(t) for t in told if t in may][:DRAWN]


def compiled(spec: Spec, device: Device, name: str, tile: Tile) -> Resources:
    """What a kernel takes with this tile."""
    file = write_experts(spec)
    kernel = file.kernels[name]
    signature = {a.name: a.type for a in kernel.arguments} | dict.fromkeys(kernel.constants, "constexpr")
    tma = isinstance(device.arch, int) and device.arch >= 90
    known = {
        "UNITS": tile.units, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": 8,
        "TMA": int(tma), "SPLIT_K": 2, "AHEAD": device.units if tma and tile.units > 1 else 0,
    }  # fmt: skip
    constants = {c: known[c] for c in kernel.constants}
    aligned = frozenset(a.name for a in kernel.arguments if a.type != "i32")
    function = getattr(load_module(file.text), name)
    return compile_kernel(
        function, signature, constants, device, warps=tile.num_warps, stages=tile.num_stages, aligned=aligned
    ).resources


def cases() -> list[tuple[str, str, int, str]]:
    """Layers, GPUs, tokens and GEMMs that are judged: in bf16, then in fp8."""
    fp8 = [f"{name} in fp8" for name in FP8_LAYERS]
    found = list(itertools.product(LAYERS, TARGETS, TOKENS, KERNELS))
    return found + list(itertools.product(fp8, FP8_TARGETS, TOKENS, KERNELS))


def noted_as(name: str) -> str:
    """The layer that stands for another: tiles fit it as they fit the other."""
    if name.endswith(" in fp8"):
        return FP8
    return MASKED if name == MASKED else EVEN


def form_of(kernel: str, tile: Tile) -> str:
    """The kernel of a tile."""
    return SHARED if tile.split_k > 1 else HALVES if tile.halves else kernel


def compile_some(path: Path, most: int) -> None:
    """Compile what is not noted yet, ``most`` tiles of it; every tile is noted as it is done."""
    known = {(c.layer, c.target, c.kernel, c.tile): c for c in read(path)} if path.exists() else {}
    wanted = []
    for name, target, tokens, kernel in cases():
        tile: Tile = getattr(pick(layer_of(spec_of(name)), tokens, device_of(target)), kernel)
        wanted.append((noted_as(name), target, form_of(kernel, tile), numbers(tile)))
    which = list(itertools.product((EVEN, MASKED), TARGETS, (*KERNELS, SHARED)))
    lists = [(at, drawn(device_of(at[1]), at[2])) for at in which]
    lists += [(at, grid(device_of(at[1]), at[0], at[2])) for at in which if at[2] != SHARED]
    which = list(itertools.product((FP8,), FP8_TARGETS, (*KERNELS, HALVES)))
    lists += [(at, fp8_grid(device_of(at[1]), at[2])) for at in which]
    wanted += [(*at, numbers(tile)) for at, tiles in lists for tile in tiles]
    wanted = [w for w in dict.fromkeys(wanted) if w not in known]
    for at, (layer, target, kernel, tile) in enumerate(wanted[:most], 1):
        try:
            r = compiled(spec_of(layer), device_of(target), kernel, tile_of(tile))
            taken = (r.registers, r.spills, r.shared, r.columns, r.occupancy, " ".join(r.mma))
            found = Compiled(layer, target, kernel, tile, *taken)
        except CrossError:
            found = Compiled(layer, target, kernel, tile)
        known[layer, target, kernel, tile] = found
        print(f"{at}/{len(wanted)} {found}", flush=True)
        write(path, list(known.values()))


def read(path: Path) -> list[Compiled]:
    """The notes."""
    fields, *rows = json.loads(path.read_text(encoding="utf-8"))
    return [Compiled(**dict(zip(fields, row, strict=True)) | {"tile": tuple(row[3])}) for row in rows]


def write(path: Path, found: list[Compiled]) -> None:
    """A line for every tile, under the names of its fields."""
    lines = [json.dumps(list(asdict(found[0])))] + [json.dumps(list(asdict(c).values())) for c in found]
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    part.replace(path)


@dataclass(frozen=True)
class Judged:
    """A case: the tile of the model, and how much longer it takes than the best that was compiled."""

    tile: Tile
    taken: Compiled
    expected: Usage
    tiles: int
    best: Tile
    loss: float


def judge(name: str, target: str, tokens: int, kernel: str, notes: list[Compiled]) -> Judged:
    """Time every tile that was compiled for a GEMM, with what the compiler took.

    Both GEMMs share the rows of a tile, so that of down is compared with tiles of the same rows; where programs share
    its sums, with what that kernel takes.

    Raises:
        KeyError: The model's choice has not been compiled.
    """
    device, layer = device_of(target), layer_of(spec_of(name))
    choice, load = pick(layer, tokens, device), load_of(layer, tokens)
    chosen: Tile = getattr(choice, kernel)
    gemm = layer.of(choice.down).gemms[KERNELS.index(kernel)]
    which = (noted_as(name), target, form_of(kernel, chosen))
    own = [c for c in notes if (c.layer, c.target, c.kernel) == which and c.registers]
    own = [c for c in own if kernel == "up" or c.tile[:2] == numbers(chosen)[:2]]
    tiles = [replace(tile_of(c.tile), split_k=chosen.split_k) for c in own]
    table = table_of(device, tiles, gemm.parts, gemm.dtype, gathered=gemm.gathered)
    really = replace(table, resident=np.array([float(max(1, c.occupancy)) for c in own]))
    seconds = np.where([c.spills > 0 for c in own], np.inf, times(gemm, load, device, really).seconds)
    at = {c.tile: i for i, c in enumerate(own)}[numbers(chosen)]
    best = int(np.argmin(seconds))
    expected = usage(device, chosen, gemm.parts, gemm.dtype, gathered=gemm.gathered)
    loss = float(seconds[at] / seconds[best] - 1)
    return Judged(chosen, own[at], expected, len(own), table.tiles[best], loss)


def _short(tile: Tile) -> str:
    height = f"{tile.block_m}" + (f"*{tile.units}" if tile.units > 1 else "")
    return f"{height}x{tile.block_n}x{tile.block_k} {tile.num_warps}w {tile.num_stages}s"


def report(notes: list[Compiled]) -> None:
    """Print a line for every case, and what they come to."""
    print("| layer | GPU | tokens | GEMM | tile of the model | registers (expected) | shared | tiles | best | loss |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    found = []
    for name, target, tokens, kernel in cases():
        found.append(j := judge(name, target, tokens, kernel, notes))
        best = "the same" if numbers(j.best) == numbers(j.tile) else _short(j.best)
        print(
            f"| {name} | {target} | {tokens} | {kernel} | {_short(j.tile)} "
            f"| {j.taken.registers} ({j.expected.registers}) | {j.taken.shared} | {j.tiles} | {best} | {j.loss:.1%} |"
        )
    spilled, refused = sum(c.spills > 0 for c in notes), sum(not c.registers for c in notes)
    print(f"\n{len(notes)} tiles compiled, of which {spilled} spill and {refused} are refused; {len(found)} cases of")
    print(f"{min(j.tiles for j in found)} to {max(j.tiles for j in found)} tiles; the model's choice is the best in")
    print(f"{sum(j.loss <= 0 for j in found)}, and at most {max(j.loss for j in found):.1%} from the best;")
    print(f"{sum(j.taken.spills > 0 for j in found)} choices spill")


def main() -> None:
    """Compile, or print a line for every case and what they come to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile what is not noted yet")
    parser.add_argument("--most", type=int, default=1000, help="compile so many tiles now")
    parser.add_argument("--notes", type=Path, default=STORED)
    args = parser.parse_args()
    if args.compile:
        compile_some(args.notes, args.most)
    else:
        report(read(args.notes))


if __name__ == "__main__":
    main()
