"""A layer through the ``torch.compile`` door beside the same layer run by eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moec
from moec.report import BlockReport, Report
from tests.published.experts import HIDDEN

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Largest |difference| / max(1, max |value|)."""
OPTIONS = {"inner": "eager", "backends": ["aten"]}


@dataclass(frozen=True)
class Tokens:
    """One call's input.

    Attributes:
        count: T.
        skewed: The tokens are nearly alike, so that most of them choose the same experts.
        train: Gradients are compared too.
    """

    count: int
    skewed: bool = False
    train: bool = True

    def make(self, dtype: torch.dtype) -> Tensor:
        gen = torch.Generator().manual_seed(self.count)
        x = torch.randn(self.count, HIDDEN, generator=gen)
        if self.skewed:
            x = 0.2 * x + torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
        return x.to(dtype)


CALLS = (Tokens(7), Tokens(12, skewed=True), Tokens(1), Tokens(0, train=False))


def near(got: Tensor, want: Tensor, what: str, dtype: torch.dtype = torch.float32) -> None:
    """The same up to the :data:`TOLERANCE` of a computation in ``dtype``."""
    assert got.shape == want.shape and got.dtype == want.dtype, what
    assert got.isnan().equal(want.isnan()), f"{what}: other NaNs"
    if want.numel():
        got, want, limit = got.double().nan_to_num(), want.double().nan_to_num(), TOLERANCE[dtype]
        error = float((got - want).abs().max() / want.abs().max().clamp_min(1))
        assert error <= limit, f"{what}: off by {error:.3g}"


def compare(
    make: Callable[[], nn.Module],
    calls: Sequence[Tokens] = CALLS,
    *,
    dtype: torch.dtype = torch.float32,
    options: dict[str, Any] | None = None,
) -> Report:
    """Run both for every call, in one graph each; outputs, gradients and written inputs must agree.

    Returns:
        What the compiles found.
    """
    torch._dynamo.reset()
    eager, compiled = make(), make()
    run = torch.compile(compiled, backend="moec", fullgraph=True, dynamic=True, options=OPTIONS | (options or {}))
    with moec.recording() as report:
        for call in calls:
            mine, theirs = (call.make(dtype).requires_grad_(call.train) for _ in range(2))
            given, kept = mine * 1, theirs * 1  # the layer may write to its input
            with torch.set_grad_enabled(call.train):
                got, want = run(given), eager(kept)
            near(got.detach(), want.detach(), f"output of {call}", dtype)
            near(given.detach(), kept.detach(), f"input of {call} afterwards", dtype)
            if call.train:
                got.square().sum().backward()
                want.square().sum().backward()
                assert mine.grad is not None and theirs.grad is not None
                near(mine.grad, theirs.grad, f"gradient of the input of {call}", dtype)
    for (name, a), (_, b) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            near(a.grad, b.grad, f"gradient of {name}", dtype)
    return report


def fused(report: Report) -> list[BlockReport]:
    """The blocks, all of which must have become one ``moe.experts``."""
    assert report.layers, report.remarks
    for block in report.layers:
        assert block.fused, f"{block.name}: {block.reason}"
        assert block.ir_after.count("= moe.experts ") == 1, block.ir_after
    return report.layers
