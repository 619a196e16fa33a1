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
    "deepseek_v3.json",
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


def test_deepseek_v3_is_of_its_size() -> None:
    from moec.cli.hugging_face import config_from, on_meta
    from moec.cli.model import read_config

    file = ROOT / "examples" / "deepseek_v3.json"
    config = config_from(read_config(file), file)
    config.num_hidden_layers = 5
    dense, sparse = 3, 58  # of the model's 61 layers; here there are two of the latter
    layers = on_meta(config, None, file).model.layers  # type: ignore[union-attr]
    size = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    ends = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    assert round((dense * size[0] + sparse * size[4] + ends) / 1e9) == 671
