"""A whole Qwen3-MoE-shaped model: eager, Inductor and moec, in tokens a second.

    python benchmarks/model.py [--tokens 1024] [--batches 1,16] [--variants inductor,aten,cpu] [--json FILE]
    python benchmarks/model.py --train [--tokens 256] [--dtype f32]

The demo's model (two layers of Qwen3-30B-A3B's sizes, made-up weights). A prefill is one forward without a cache; a
decode step is one token for each sequence of a batch with a fixed-size cache, always at the same position. ``aten`` and
``cpu`` are moec with the backends ``["aten"]`` and ``["cpu", "aten"]``. ``--train`` times forward, backward and an SGD
step, with a small vocabulary so that the head does not hide the layers.

All variants share the weights, in one process; everything is compiled and warm first, then they take turns, one call
each; times are medians.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moec.api import compile as moec_compile
from moec.demo import check
from moec.demo import model as demo
from moec.demo.timing import LOGITS_KEPT, Decode, prefill
from shapes import DTYPES, parse_tokens
from training import training_task
from turns import BASE, Task, largest_difference, print_tasks, take_turns

VARIANTS = ("inductor", "aten", "cpu")
TINY = demo.Shape("tiny", 64, 32, 8, 2, 2, 1, 32, 256, 32)
SIZES = {"full": demo.FULL, "small": demo.SMALL, "tiny": TINY}
TRAIN_VOCABULARY = 8192


def main() -> None:
    """Reads the command line, compiles, measures, prints."""
    args = arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module=r"torch\..*")
    # Every variant compiles the same code objects anew, for every length.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    screen, out = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 160)
    shape = SIZES[args.size]
    if args.train:
        shape = replace(shape, vocabulary=min(shape.vocabulary, TRAIN_VOCABULARY))
    start = time.perf_counter()
    model = demo.build(shape)
    model = model.to(DTYPES[args.dtype])
    if args.train:
        model = model.train().requires_grad_(True)
    screen.print(f"{shape.label}: built in {time.perf_counter() - start:.0f} s", highlight=False)
    models = {name: variant(name, model, args.inner) for name in (BASE, *args.variants)}
    if args.train:
        timed = take_turns([training_task(models, args.tokens, shape.vocabulary)], args.seconds, screen)
    else:
        with torch.no_grad():
            timed = take_turns(inference_tasks(models, args, shape), args.seconds, screen)
    title = f"{shape.label}, {shape.layers} layers, {args.dtype}, {args.threads} threads"
    print_tasks(timed, title, "inductor" if "inductor" in models else BASE, out)
    if args.json:
        found = {
            "model": shape.label,
            "dtype": args.dtype,
            "threads": args.threads,
            "torch": torch.__version__,
            "inner": args.inner,
            "tasks": [t.as_json() for t in timed],
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def variant(name: str, model: Any, inner: str) -> Any:
    """``model`` itself, or a twin on the same weights that is compiled at its first call."""
    if name == BASE:
        return model
    twin = demo.twin(model)
    if name == "inductor":
        return torch.compile(twin, dynamic=False)
    return moec_compile(twin, dynamic=False, backends=["cpu", "aten"] if name == "cpu" else ["aten"], inner=inner)


def inference_tasks(models: dict[str, Any], args: argparse.Namespace, shape: demo.Shape) -> list[Task]:
    """The prefill, and a decode step for each batch size."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (1, args.tokens), generator=generator)
    near = check.near_ties(Decode(models[BASE], ids).router_logits, shape.top_k)[-LOGITS_KEPT:]
    tasks = [
        Task(
            f"prefill of {args.tokens}",
            args.tokens,
            {name: _bind(prefill, model, ids) for name, model in models.items()},
            lambda logits: logits,
            # A token whose routing is a near tie may go elsewhere: that is no error.
            lambda expected, got: check.check_model(expected, got, near).largest,
        )
    ]
    for batch in args.batches:
        prompt = torch.randint(shape.vocabulary, (batch, args.context), generator=generator)
        step = Decode(models[BASE], prompt)
        calls = {name: _bind(_decode, model, step) for name, model in models.items()}
        tasks.append(Task(f"decode, batch {batch}", batch, calls, lambda logits: logits, largest_difference))
    return tasks


def _decode(model: Any, step: Decode) -> Tensor:
    return step(model)


def _bind(run: Callable[[Any, Any], Any], model: Any, argument: Any) -> Callable[[], Any]:
    return lambda: run(model, argument)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="full")
    add("--tokens", type=int, help="of the prefill (1024) or of the training step (256)")
    add("--batches", type=parse_tokens, default=[1, 16], help="sequences of a decode step; default 1,16")
    add("--context", type=int, default=64, help="tokens of each sequence before the decode step")
    add("--variants", default=",".join(VARIANTS), help=f"beside eager, of {','.join(VARIANTS)}")
    add("--train", action="store_true", help="a training step")
    add("--dtype", choices=sorted(DTYPES), help="bf16; f32 for training")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, default=20.0, help="for each row group; at least three rounds are taken")
    add("--inner", default="inductor", help="who compiles what is not MoE in moec's variants")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.tokens = args.tokens or (256 if args.train else 1024)
    args.dtype = args.dtype or ("f32" if args.train else "bf16")
    if not args.train and args.tokens < LOGITS_KEPT:
        parser.error(f"--tokens {args.tokens}: a prefill has at least {LOGITS_KEPT}")
    args.variants = [v for v in args.variants.split(",") if v and v != BASE]
    if unknown := [v for v in args.variants if v not in VARIANTS]:
        parser.error(f"--variants {unknown[0]}: choose of {', '.join(VARIANTS)}")
    return args


if __name__ == "__main__":
    main()
