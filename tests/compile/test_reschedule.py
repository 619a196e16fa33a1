"""Micro-batches that share their tokens, through the compile door (cut) and the export door (as the model has them).

The cpu backend gives a row the same bits in any batch, so results are compared bit by bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import moec
from moec.backends.cpu.build import compiler
from moec.runtime import counters
from tests.compile.blocks import HIDDEN, Block, Layers, tokens

GRADIENTS = 1e-5
"""Of experts' weights, relative to the largest: their sums over tokens run in another order."""
CUT = "default,reschedule-tokens{cut=true,always=true},cse,dce"

pytestmark = pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler")


class Halves(torch.nn.Module):
    """A layer on two micro-batches, and something on each result."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(seed=3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first = self.block(a) * 2
        second = self.block(b.neg())
        return first + a, second + b


def step(model: torch.nn.Module, run: Any, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Result, gradient of the tokens, gradients of the parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_training_step_in_parts(inner: str) -> None:
    model = Layers(Block(seed=1), Block(seed=2))
    plain = torch.compile(model, backend="moec", options={"inner": inner}, dynamic=True)
    parts = torch.compile(model, backend="moec", options={"inner": inner, "passes": CUT}, dynamic=True)
    for count in (7, 12, 3):
        want, want_x, want_p = step(model, plain, tokens(count))
        counters.reset()
        got, got_x, got_p = step(model, parts, tokens(count))
        ran = counters.snapshot().by_name
        assert (ran["moec::regroup"], ran["moec::experts"], ran["moec::experts_backward"]) == (2, 4, 4)
        assert torch.equal(got, want)
        assert torch.equal(got_x, want_x)
        assert torch.equal(got_p["layers.0.router"], want_p["layers.0.router"])
        for name, gradient in want_p.items():
            assert (got_p[name] - gradient).abs().max() <= GRADIENTS * gradient.abs().max(), name


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_tokens(count: int) -> None:
    model = Block()
    with torch.no_grad():
        want = torch.compile(model, backend="moec", options={"inner": "eager"})(tokens(count))
        got = torch.compile(model, backend="moec", options={"inner": "eager", "passes": CUT})(tokens(count))
    assert torch.equal(got, want)


def test_without_a_profile_nothing_changes_and_the_report_says_why() -> None:
    model = Block()
    with moec.recording() as report, torch.no_grad():
        torch.compile(
            model, backend="moec", options={"inner": "eager", "passes": "default,reschedule-tokens{cut=true}"}
        )(tokens(6))
    assert counters.snapshot().by_name == {"moec::route": 1, "moec::experts": 1}
    assert any("there is no routing profile" in remark for remark in report.layers[0].remarks)


def test_the_micro_batches_of_an_exported_program_share_their_tokens() -> None:
    model = Halves().eval()
    a, b = Dim("a", min=2, max=64), Dim("b", min=2, max=64)
    program = torch.export.export(model, (tokens(6), tokens(5, seed=2)), dynamic_shapes=({0: a}, {0: b}), strict=False)
    plain = moec.optimize(program).module()
    shared = moec.optimize(program, passes="default,reschedule-tokens{always=true},cse,dce").module()
    for sizes in ((6, 5), (33, 20)):
        inputs = [tokens(n, seed=n) for n in sizes]
        with torch.no_grad():
            want = plain(*inputs)
            counters.reset()
            got = shared(*inputs)
        ran = counters.snapshot().by_name
        assert (ran["moec::regroup"], ran["moec::experts"]) == (1, 2)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        assert got[0].shape == (sizes[0], HIDDEN)
