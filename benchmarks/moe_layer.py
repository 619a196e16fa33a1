"""One MoE layer: moec's cpu backend beside its peers, and beside what the machine's memory and arithmetic allow.

    python benchmarks/moe_layer.py --peers                           # every shape and every token count in bf16
    python benchmarks/moe_layer.py --shapes olmoe --tokens 1,64 --dtype f32 --json layer.json --picture layer.png
    python benchmarks/moe_layer.py --shapes olmoe --tokens 256 --skew compare

Everybody gets the same weights, tokens and router choices, in one process, one call each in turn; times are medians.
``limit`` is max(FLOPs / best GEMM, bytes of touched experts / read bandwidth), measured here and now with as many
threads (machine.py). Weights come from memory: copies of a layer take turns (routing.py). A peer that is not installed,
or cannot run a layer, is told of and left out (peers.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import peers as others
from machine import FULL, QUICK, Machine, measure
from ours import make_weights, moec_calls
from picture import draw
from report import cell_json, machine_json, print_cells, print_machine, print_skew, print_summary, summary
from routing import copies_for
from shapes import DTYPES, SHAPES, Shape, parse_shapes, parse_tokens
from skew import compare
from timing import Bench

SPARE_BYTES = 3 << 30
"""Left free: activations of the largest cells, and whatever else runs."""


def main() -> None:
    """Reads the command line, measures, prints."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    others.set_paths({"vllm": args.vllm, "zentorch": args.zentorch})
    shapes, tokens = parse_shapes(args.shapes), parse_tokens(args.tokens)
    screen, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 200)
    with torch.no_grad(), progress(screen) as show:
        task = show.add_task("the machine", total=1 + len(shapes) * len(tokens))
        machine = measure(
            args.dtype,
            args.threads,
            args.target,
            lambda text: show.update(task, description=f"the machine: {text}"),
            QUICK if args.quick else FULL,
        )
        show.advance(task)
        names = others.wanted_peers(args.dtype, args.peers, show.console.print) if args.peers else []
        cells: list[dict[str, Any]] = []
        for shape in shapes:
            bench = set_up(args, shape, names, show)
            for count in tokens:
                show.update(task, description=f"{shape.name}, T = {count}")
                if args.skew == "compare":
                    cells.append(compare(bench, count, args.zipf, args.seconds, show.console.print))
                else:
                    exponent = args.zipf if args.skew == "zipf" else 0.0
                    cells.append(cell_json(bench.time(count, exponent, args.seconds, show.console.print), machine))
                show.advance(task)
                if not screen.is_terminal:
                    screen.print(f"{shape.name}, T = {count}: done", highlight=False)
            bench.release()
            del bench
            gc.collect()
            write(args, machine, cells)  # a long run that is cut short leaves what it has
    report(args, machine, cells, out)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", default="all", help=f"of {', '.join(SHAPES)}, or H:I:E:k, separated by commas; default all")
    add("--tokens", default="1,4,16,64,256,1024,4096", help="token counts, separated by commas")
    add("--dtype", default="bf16", choices=sorted(DTYPES))
    add("--threads", type=int, default=torch.get_num_threads())
    add("--target", default="cpu", help="target of the cpu backend, such as cpu:avx2")
    add("--seconds", type=float, default=4.0, help="for each cell; at least three rounds are taken")
    add(
        "--peers", nargs="?", const=",".join(others.PEERS), default="", help=f"all, or some of {','.join(others.PEERS)}"
    )
    add("--vllm", metavar="PATH", help="folder with vllm/_C.abi3.so ($MOEC_BENCH_VLLM)")
    add("--zentorch", metavar="PATH", help="folder with zentorch/libzentorch_stable.so ($MOEC_BENCH_ZENTORCH)")
    add("--rotate", type=float, default=1.0, metavar="GB", help="weights read between two uses; 0: one copy")
    add("--skew", choices=("even", "zipf", "compare"), default="even", help="router choices; compare takes both")
    add("--zipf", type=float, default=1.2, metavar="S", help="exponent of --skew; default 1.2")
    add("--quick", action="store_true", help="coarse rates of the machine, to try the script: no limit to believe in")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE")
    add("--picture", type=Path, metavar="FILE.png", help="roofline; needs matplotlib")
    args = parser.parse_args()
    args.peers = [p for p in args.peers.split(",") if p]
    if unknown := [p for p in args.peers if p not in others.PEERS]:
        parser.error(f"--peers {unknown[0]}: choose of {', '.join(others.PEERS)}")
    if args.picture and args.skew == "compare":
        parser.error("--picture draws cells; --skew compare makes none")
    return args


def set_up(args: argparse.Namespace, shape: Shape, names: list[str], show: Progress) -> Bench:
    """The weights of one shape and everybody who runs on them."""
    tell, dtype = show.console.print, DTYPES[args.dtype]
    size = shape.weight_bytes(dtype)
    stores = 1 + sum(name in others.NATIVE for name in names)
    free = available_bytes() - SPARE_BYTES
    copies = copies_for(size, args.rotate * 2**30, stores, free) if args.rotate else 1
    if args.rotate and (copies - 1) * size < args.rotate * 2**30 and size < 2 * args.rotate * 2**30:
        tell(f"{shape.name}: {copies} copies of {size / 2**20:.0f} MB; caches may hold part of the weights")
    weights = make_weights(shape, dtype, copies)
    layers = [
        others.Implementation(name, moec_calls(name, target, args.dtype, shape, weights))
        for name, target in (("cpu", args.target), ("aten", "cpu"))
    ]
    for name in names:
        try:
            if name in others.NATIVE and available_bytes() - SPARE_BYTES < copies * size:
                raise others.RefusalError(f"no memory for its {copies * size / 2**30:.1f} GB of packed weights")
            layers.append(others.make_peer(name, shape, weights))
        except others.RefusalError as reason:
            tell(f"{shape.name}: {name} is left out: {reason}")
    bench = Bench(shape, dtype, weights, layers)
    bench.warm_up(tell)
    return bench


def available_bytes() -> int:
    """Memory that can be taken without swapping (Linux ``MemAvailable``)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/meminfo has no MemAvailable; this benchmark needs Linux")


def write(args: argparse.Namespace, machine: Machine, cells: list[dict[str, Any]]) -> None:
    """The JSON file, if one is wanted."""
    if args.json is None:
        return
    found: dict[str, Any] = {
        "machine": machine_json(machine),
        "torch": torch.__version__,
        "settings": {"skew": args.skew, "zipf": args.zipf, "rotate": args.rotate, "target": args.target},
        "cells": cells,
    }
    if args.skew != "compare":
        found["summary"] = summary(cells)
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def report(args: argparse.Namespace, machine: Machine, cells: list[dict[str, Any]], out: Console) -> None:
    """Prints the tables and draws the picture."""
    print_machine(machine, out)
    if args.skew == "compare":
        print_skew(cells, out)
        return
    print_cells(cells, out)
    print_summary(summary(cells), out)
    if args.picture:
        draw(cells, machine_json(machine), args.picture)


@contextmanager
def progress(screen: Console) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere only what is told."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        yield bar


if __name__ == "__main__":
    main()
