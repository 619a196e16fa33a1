"""How long ahead-of-time compilation takes, and how an artifact compares with the torch.compile door.

    python benchmarks/artifact.py [--size full] [--layers 2] [--tokens 1,16,256] [--target cpu] [--skip speed]
    python benchmarks/artifact.py --generate [--size full] [--layers 2] [--target cpu]

Compile: seconds of ``moec compile`` on a made-up model with empty caches, and again when the code is in the cache, as
when weights alone have changed; with ``--generate`` nothing else. Start: seconds from nothing loaded to the first
logits, in processes of their own: the artifact, and ``moec.compile`` on warm caches (there less the second call, which
compiles nothing). Speed: milliseconds of a call of both, in one process, in turns. Prints tables and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TURNS = 7
GENERATE = "batch=1..4,seq=1..512"


def write_config(path: Path, size: str, layers: int) -> None:
    """A Qwen3-MoE ``config.json`` of the benchmarks' model."""
    from model import SIZES

    s = replace(SIZES[size], layers=layers)
    values = {
        "model_type": "qwen3_moe", "vocab_size": s.vocabulary, "hidden_size": s.hidden, "num_hidden_layers": layers,
        "intermediate_size": 3 * s.hidden, "moe_intermediate_size": s.intermediate, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "num_experts": s.experts, "norm_topk_prob": True,
        "num_experts_per_tok": s.top_k, "decoder_sparse_step": 1, "max_position_embeddings": 4096, "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    path.write_text(json.dumps(values), encoding="utf-8")


def artifact_start(path: str, tokens: int) -> dict[str, float]:
    """Seconds until an artifact is loaded, of its first call, and of the second, in this process."""
    import torch

    from moec.artifact.load import load

    ids = torch.ones(1, tokens, dtype=torch.int64)
    begin = time.perf_counter()
    model = load(path)
    loaded = time.perf_counter()
    model(ids)
    first = time.perf_counter()
    model(ids)
    second = time.perf_counter()
    return {"start": first - begin, "load": loaded - begin, "first": first - loaded, "second": second - first}


def jit_start(size: str, layers: int, tokens: int) -> dict[str, float]:
    """Seconds of the first call of ``moec.compile`` in this process, and of the second."""
    import torch

    from moec.api import compile as moec_compile

    model, ids = jit_model(size, layers), torch.ones(1, tokens, dtype=torch.int64)
    compiled = moec_compile(model)
    seconds = []
    with torch.no_grad():
        for _ in range(2):
            begin = time.perf_counter()
            compiled(input_ids=ids, use_cache=False)
            seconds.append(time.perf_counter() - begin)
    return {"start": seconds[0] - seconds[1], "first": seconds[0], "second": seconds[1]}


def jit_model(size: str, layers: int) -> Any:
    """The benchmarks' model with made-up weights."""
    from model import SIZES
    from moec.demo import model as demo

    return demo.build(replace(SIZES[size], layers=layers))


def speed(path: str, size: str, layers: int, tokens: list[int]) -> dict[str, dict[str, float]]:
    """Milliseconds of a call through both doors, taken in turns; medians."""
    import torch

    from moec.api import compile as moec_compile
    from moec.artifact.load import load

    artifact = load(path).entries["model"]
    compiled = moec_compile(jit_model(size, layers))
    found = {}
    with torch.no_grad():
        for count in tokens:
            ids = torch.randint(1, 1000, (1, count), generator=torch.Generator().manual_seed(count))
            doors = {
                "jit": lambda ids=ids: compiled(input_ids=ids, use_cache=False),
                "artifact": lambda ids=ids: artifact(ids),
            }
            times: dict[str, list[float]] = {name: [] for name in doors}
            for turn in range(TURNS + 1):
                for name, call in doors.items():
                    begin = time.perf_counter()
                    call()
                    if turn:
                        times[name].append((time.perf_counter() - begin) * 1e3)
            found[str(count)] = {name: statistics.median(t) for name, t in times.items()}
    return found


def compile_times(config: Path, out: Path, args: argparse.Namespace, env: dict[str, str]) -> dict[str, float]:
    """Seconds of ``moec compile``, those of processors when cold, and its largest memory in GB."""
    command = [
        sys.executable,
        "-m",
        "moec",
        "compile",
        str(config),
        "--random-weights",
        "-o",
        str(out),
        "--target",
        args.target,
        *(["--generate", "--dynamic", GENERATE] if args.generate else []),
    ]
    found = {}
    for name in ("cold", "code cached"):
        begin = time.perf_counter()
        made = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = time.perf_counter() - begin
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.setdefault("processors", used.ru_utime + used.ru_stime)
        print(made.stdout.strip(), file=sys.stderr)
    found["memory"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return found


def step(words: list[str], env: dict[str, str]) -> dict[str, Any]:
    """This script with ``words`` in a process of its own: what it prints last."""
    done = subprocess.run([sys.executable, __file__, *words], env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Reads the command line, starts the processes, prints."""
    args = arguments()
    if args.step == "artifact":
        print(json.dumps(artifact_start(args.path, args.tokens[0])))
    elif args.step == "jit":
        print(json.dumps(jit_start(args.size, args.layers, args.tokens[0])))
    elif args.step == "speed":
        print(json.dumps(speed(args.path, args.size, args.layers, args.tokens)))
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """All parts, on caches of their own."""
    screen, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 120)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        # AOTInductor keeps its precompiled headers in the temporary directory whatever its cache directory is.
        own = {"TMPDIR": folder, "MOEC_CACHE_DIR": f"{folder}/moec", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        env = {**os.environ, **own}
        path, common = Path(folder) / "model.moec", ["--size", args.size, "--layers", str(args.layers)]
        write_config(Path(folder) / "config.json", args.size, args.layers)
        screen.print("compile ...")
        found["compile"] = compile_times(Path(folder) / "config.json", path, args, env)
        found["bytes"] = path.stat().st_size
        if "start" not in args.skip:
            screen.print("start ...")
            words = [*common, "--tokens", "1", "--path", str(path)]
            step(["--step", "jit", *words], env)  # fills the caches
            doors = {"artifact": "artifact", "jit": "jit"}
            runs = {d: [step(["--step", d, *words], env) for _ in range(3)] for d in doors}
            found["start"] = {d: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for d, rs in runs.items()}
        if "speed" not in args.skip:
            screen.print("speed ...")
            words = [*common, "--tokens", ",".join(map(str, args.tokens)), "--path", str(path)]
            found["speed"] = step(["--step", "speed", *words], env)
    show(found, args, out)
    print(json.dumps(found))


def show(found: dict[str, Any], args: argparse.Namespace, out: Console) -> None:
    """The tables."""
    table = Table(
        title=f"moec compile, {args.size}, {args.layers} layers, {args.target}, {found['bytes'] / 1e9:.2f} GB"
    )
    for column in ("cold, s", "of processors, s", "code cached, s", "most memory, GB"):
        table.add_column(column, justify="right")
    c = found["compile"]
    table.add_row(f"{c['cold']:.1f}", f"{c['processors']:.1f}", f"{c['code cached']:.1f}", f"{c['memory']:.2f}")
    out.print(table)
    if "start" in found:
        table = Table(title="to the first logits, s")
        for column in ("artifact", "moec.compile, warm", "ratio"):
            table.add_column(column, justify="right")
        a, j = found["start"]["artifact"]["start"], found["start"]["jit"]["start"]
        table.add_row(f"{a:.3f}", f"{j:.2f}", f"{a / j:.3f}")
        out.print(table)
    if "speed" in found:
        table = Table(title="a call, ms")
        for column in ("tokens", "artifact", "moec.compile", "speed of the artifact"):
            table.add_column(column, justify="right")
        for tokens, row in found["speed"].items():
            table.add_row(tokens, f"{row['artifact']:.2f}", f"{row['jit']:.2f}", f"{row['jit'] / row['artifact']:.2f}")
        out.print(table)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=("full", "small", "tiny"), default="full", help="of the model")
    add("--layers", type=int, default=2)
    add("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 256], help="of a call")
    add("--target", default="cpu", help="of moec compile")
    add("--skip", type=lambda text: text.split(","), default=[], help="of start,speed")
    add("--generate", action="store_true", help="compile the two entries for generating, and measure nothing else")
    add("--folder", type=Path, default=None, help="where the artifact and the caches are kept meanwhile")
    add("--step", choices=("artifact", "jit", "speed"), help=argparse.SUPPRESS)
    add("--path", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate:
        args.skip = ["start", "speed"]
    return args


if __name__ == "__main__":
    main()
