"""Compile time of a deep MoE model: 48 layers of 128 experts at small widths, cold and with warm caches.

    python benchmarks/compile_time.py [--layers 48] [--experts 128]

Every row is a process of its own with cache directories of its own; "warm" is a second process on the same
directories. A time is that of the first call, compiling included. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

DOORS = {
    "inductor": "torch.compile(model)",
    "bare": 'torch.compile(model, backend="moec")',
    "moec": "moec.compile(model)",
}


def measure(door: str, layers: int, experts: int) -> dict[str, float]:
    """Seconds of the first call through one door, and the largest difference to eager's logits."""
    import torch
    import transformers

    import moec

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(0, 256, (1, 64))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        start = time.perf_counter()
        if door == "inductor":
            compiled = torch.compile(model)
        elif door == "bare":
            compiled = torch.compile(model, backend="moec")
        else:
            compiled = moec.compile(model)
        got = compiled(input_ids=tokens).logits
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "error": (got - expected).abs().max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--door", choices=DOORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.door:
        print(json.dumps(measure(args.door, args.layers, args.experts)))
        return
    found: dict[str, dict[str, float]] = {}
    sizes = ["--layers", str(args.layers), "--experts", str(args.experts)]
    print(f"{args.layers} layers of {args.experts} experts, first call in seconds")
    for door, call in DOORS.items():
        with tempfile.TemporaryDirectory() as caches:
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "MOEC_CACHE_DIR": f"{caches}/moec"}
            row = {}
            for state in ("cold", "warm"):
                command = [sys.executable, "-W", "ignore", __file__, "--door", door, *sizes]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
                row[state] = json.loads(done.stdout.splitlines()[-1])["seconds"]
        found[door] = row
        print(f"{call:40} cold {row['cold']:6.1f}   warm {row['warm']:6.1f}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
