"""Memory above the loaded weights while a model runs: eager, Inductor and moec, each in a process of its own.

    python benchmarks/memory.py [--small] [--tokens 1024]

The peak is the process's resident set (Linux ``VmHWM``), reset after the compiled model has run once, so that what
compiling needs is not counted. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

DOORS = ("eager", "inductor", "moec")
MEGABYTE = 1 << 20


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; this benchmark needs Linux")


def measure(door: str, small: bool, tokens: int) -> dict[str, float]:
    """Run one door in this process.

    Returns:
        Bytes of weights, and the peak above what was resident once they were loaded, for a prefill of ``tokens``
        tokens and for a step of one token. What compiling leaves behind in the process counts.
    """
    import torch

    from moec.demo import model as demo
    from moec.demo.timing import last_tokens

    loaded = demo.build(demo.SMALL if small else demo.FULL)
    called = loaded
    if door == "inductor":
        called = torch.compile(loaded)
    elif door == "moec":
        called = torch.compile(loaded, backend="moec")
    out: dict[str, float] = {"weights": demo.weight_bytes(loaded)}
    loaded_size = resident("VmRSS")
    for name, count in (("prefill", tokens), ("decode", 1)):
        ids = torch.randint(0, loaded.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for _ in range(2):
                called(input_ids=ids, use_cache=False, logits_to_keep=last_tokens(1))
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            called(input_ids=ids, use_cache=False, logits_to_keep=last_tokens(1))
            out[name] = resident("VmHWM") - loaded_size
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the demo's small model")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the prefill")
    parser.add_argument("--door", choices=DOORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.door:
        print(json.dumps(measure(args.door, args.small, args.tokens)))
        return
    found: dict[str, dict[str, float]] = {}
    for door in DOORS:
        print(f"measuring {door} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--door", door, "--tokens", str(args.tokens)]
        command += ["--small"] if args.small else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[door] = json.loads(done.stdout.splitlines()[-1])
    weights = found["eager"]["weights"]
    print(f"weights {weights / MEGABYTE:.0f} MB; peak above them in MB (beyond eager's, in % of the weights)")
    for name in ("prefill", "decode"):
        cells = [
            f"{d} {found[d][name] / MEGABYTE:.0f} ({(found[d][name] - found['eager'][name]) / weights * 100:+.1f} %)"
            for d in DOORS
        ]
        print(f"{name:8}", "   ".join(cells))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
