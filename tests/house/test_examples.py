"""Every example runs, and shows what it says it shows."""

from __future__ import annotations

from pathlib import Path

import torch

from moec.ir.parser import parse_graph
from moec.ir.verifier import verify
from moec.runtime import counters

ROOT = Path(__file__).resolve().parents[2]
TESTED = {
    "factory.py",
    "train.py",
    "generate.py",
    "expert_parallel.py",
    "overlap.py",
    "micro_batches.py",
    "dual_batch.py",
    "mixtral_small.json",
    "qwen3_30b_a3b.json",
    "block.moe",
}


def test_every_example_is_tested() -> None:
    assert {p.name for p in (ROOT / "examples").iterdir() if p.is_file()} == TESTED


def test_train() -> None:
    from examples.train import train

    torch._dynamo.reset()
    counters.reset()
    losses = train(steps=3, inner="eager")
    assert losses[-1] < losses[0]
    ran = counters.snapshot().by_name
    assert ran["moec::experts"] == 3 * 2  # steps x layers
    assert ran["moec::experts_backward"] == 3 * 2


def test_generate() -> None:
    from examples.generate import generate

    torch._dynamo.reset()
    got, expected = generate(tokens=4, inner="eager")
    assert got.shape == (1, 20)
    assert torch.equal(got, expected)


def test_block() -> None:
    verify(parse_graph((ROOT / "examples" / "block.moe").read_text(encoding="utf-8")))
