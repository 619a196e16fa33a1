"""Adapters (peft) on the linear layers inside experts: PyTorch's path and one reason, until they are merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moec
from tests.compile.test_bad_input import listen
from tests.prepare.undecorated import block

peft = pytest.importorskip("peft")

SAME = 1e-5  # fp32 rows of the order of 1


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


class Loop(nn.Module):
    """Experts as modules of their own, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, ids = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return out


def same_step(model: nn.Module, run: Any, x: torch.Tensor) -> None:
    gradients = []
    for call in (model, run):
        model.zero_grad()
        call(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][name], want) for name, want in gradients[0].items())


class Holder(nn.Module):
    """A layer with a block in it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


def on_linears(block: nn.Module, *names: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=list(names))
        return peft.get_peft_model(Holder(block), config)


def test_adapters_inside_the_experts_of_a_loop_run_as_pytorch() -> None:
    """Each expert then has GEMMs that no op of moec's knows."""
    model, x = on_linears(Loop(), "up", "down"), torch.randn(9, 16)
    compiled, _ = listen(lambda: moec.compile(model, inner="eager", backends=("aten",)))
    with moec.recording() as report:
        _, told = listen(lambda: same_step(model, compiled, x))
    assert [b.fused for b in report.layers] == [False]
    (message,) = told
    assert "MoE block 'base_model.model.mlp' runs as PyTorch would run it" in message
    assert "base_model.model.mlp.experts.0.up is an adapter" in message
    assert "merge_and_unload()" in message
    torch._dynamo.reset()
    merged = model.merge_and_unload()
    with moec.recording() as report, torch.no_grad():
        got = moec.compile(merged, inner="eager", backends=("aten",))(x)
        assert (got - merged(x)).abs().max() <= SAME
    assert report.all_fused


def test_adapters_inside_the_experts_of_a_known_class_are_not_read_past() -> None:
    """A rewriter takes the matrices of the experts' linear layers; with an adapter around them it must not."""
    x = torch.randn(1, 7, 16)
    model = on_linears(block("switch_transformers").eval(), "wi", "wo").eval()
    compiled, told = listen(lambda: moec.compile(model, inner="eager", backends=("aten",)))
    (message,) = told
    assert "'base_model.model.mlp'" in message
    assert "experts.expert_0.wi is an adapter (peft's Linear)" in message
    with torch.no_grad():
        got, _ = listen(lambda: compiled(x))
        assert torch.equal(got, model(x))
        model.disable_adapter_layers()
        assert not torch.equal(got, model(x)), "the adapter changes nothing: the test is blind"
