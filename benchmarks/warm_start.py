"""How long kernels take to build, and how fast a second process starts on warm caches.

    python benchmarks/warm_start.py [--shapes all] [--dtype bf16] [--size small] [--doors inductor,aten,cpu]

Kernels: seconds to build each layer's kernel, and milliseconds to have it ready in later processes on the same cache.
Models: the first call of ``torch.compile(model)`` with Inductor and with moec's backends, each in processes and with
caches of their own, cold and then warm; ``start`` is the first call less the second one, which compiles nothing.
Prints tables and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DOORS: dict[str, dict[str, Any]] = {
    "inductor": {},
    "aten": {"backend": "moec", "options": {"backends": ["aten"]}},
    "cpu": {"backend": "moec", "options": {"backends": ["cpu", "aten"]}},
}
PARTS = ("kernels", "models")


def kernels(shapes: str, dtype: str, target: str) -> dict[str, float]:
    """Seconds until each shape's kernel can be called, in this process; the cache directory decides how."""
    from moec.backends.cpu.load import openmp_library
    from ours import moec_calls
    from shapes import parse_shapes

    # What a process pays once, whatever it runs, is not the kernels'.
    openmp_library()
    moec_calls("aten", "cpu", dtype, parse_shapes("64:32:4:2")[0], [])
    found = {}
    for shape in parse_shapes(shapes):
        start = time.perf_counter()
        moec_calls("cpu", target, dtype, shape, [])
        found[shape.name] = time.perf_counter() - start
    return found


def model(door: str, size: str, tokens: int, inner: str) -> dict[str, float]:
    """Seconds of the first call through one door in this process, and of the second."""
    import torch

    from model import SIZES
    from moec.demo import model as demo

    warnings.filterwarnings("ignore", module=r"torch\..*")
    loaded = demo.build(SIZES[size])
    how = dict(DOORS[door])
    if how:
        how["options"] = {**how["options"], "inner": inner}
    ids = torch.randint(loaded.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(loaded, **how)
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            compiled(input_ids=ids, use_cache=False)
            seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "second": seconds[1], "start": seconds[0] - seconds[1]}


def cold_and_warm(words: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """This script with ``words`` in processes on caches of their own.

    Returns:
        What the first process prints, as ``cold``; medians over what ``repeats`` later ones print, as ``warm``.
    """
    printed = []
    with tempfile.TemporaryDirectory() as caches:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "MOEC_CACHE_DIR": f"{caches}/moec"}
        for _ in range(1 + repeats):
            command = [sys.executable, __file__, *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            printed.append(json.loads(done.stdout.splitlines()[-1]))
    cold, *warm = printed
    return {"cold": cold, "warm": {key: statistics.median(w[key] for w in warm) for key in cold}}


def main() -> None:
    """Reads the command line, starts the processes, prints."""
    args = arguments()
    if args.step == "kernels":
        print(json.dumps(kernels(args.shapes, args.dtype, args.target)))
        return
    if args.step:
        print(json.dumps(model(args.step, args.size, args.tokens, args.inner)))
        return
    screen, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 120)
    found: dict[str, Any] = {}
    if "kernels" not in args.skip:
        screen.print("kernels ...")
        words = ["--shapes", args.shapes, "--dtype", args.dtype, "--target", args.target]
        found["kernels"] = cold_and_warm(["--step", "kernels", *words], args.repeats)
        print_kernels(found["kernels"], args.dtype, out)
    if "models" not in args.skip:
        found["models"] = {}
        for door in args.doors:
            screen.print(f"models: {door} ...")
            words = ["--size", args.size, "--tokens", str(args.tokens), "--inner", args.inner]
            found["models"][door] = cold_and_warm(["--step", door, *words], args.repeats)
        print_models(found["models"], out)
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def print_kernels(found: dict[str, dict[str, float]], dtype: str, out: Console) -> None:
    """A row for each layer."""
    table = Table(title=f"one layer's kernel, {dtype}")
    for column in ("shape", "cold, s", "warm, ms"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for name, seconds in found["cold"].items():
        table.add_row(name, f"{seconds:.2f}", f"{found['warm'][name] * 1e3:.1f}")
    out.print(table)


def print_models(found: dict[str, Any], out: Console) -> None:
    """A row for each door."""
    table = Table(title="a model's first call, s")
    for column in ("", "cold", "warm", "warm start", "above Inductor's"):
        table.add_column(column, justify="right" if column else "left")
    base = found["inductor"]["warm"]["start"] if "inductor" in found else None
    for door, row in found.items():
        start = row["warm"]["start"]
        cells = (row["cold"]["first"], row["warm"]["first"], start)
        table.add_row(door, *(f"{c:.2f}" for c in cells), "-" if base is None else f"{start - base:+.2f}")
    out.print(table)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", default="all", help="of moe_layer.py, or H:I:E:k, separated by commas")
    add("--dtype", default="bf16")
    add("--target", default="cpu", help="target of the cpu backend")
    add("--size", choices=("full", "small", "tiny"), default="small", help="of the model")
    add("--tokens", type=int, default=256, help="of the model's prefill")
    add("--inner", default="inductor", help="who compiles what is not MoE in moec's variants")
    add("--doors", type=lambda text: text.split(","), default=list(DOORS), help=f"of {','.join(DOORS)}")
    add("--repeats", type=int, default=3, help="processes on warm caches; medians are shown")
    add("--skip", type=lambda text: text.split(","), default=[], help=f"of {','.join(PARTS)}")
    add("--json", type=Path, metavar="FILE")
    add("--step", choices=("kernels", *DOORS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [s for s in args.skip if s not in PARTS]:
        parser.error(f"--skip {unknown[0]}: choose of {', '.join(PARTS)}")
    if unknown := [d for d in args.doors if d not in DOORS]:
        parser.error(f"--doors {unknown[0]}: choose of {', '.join(DOORS)}")
    return args


if __name__ == "__main__":
    main()
