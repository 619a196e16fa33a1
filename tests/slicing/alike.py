"""A compiled layer against the same layer in eager PyTorch: results, and gradients of tokens and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import moec
from moec.report import Report

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Largest |difference| / max(1, max |value|)."""


def tensors(out: Any) -> list[Tensor]:
    """The results of a layer that returns one tensor or a tuple."""
    return list(out) if isinstance(out, tuple) else [out]


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Equal, as far as ``dtype`` tells numbers apart."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if not want.dtype.is_floating_point or not want.numel():
        assert got.equal(want)
        return
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1)
    assert error <= TOLERANCE[dtype], f"off by {error:.3g}"


def same_step(run: Callable[[Tensor], Any], eager: nn.Module, x: Tensor, dtype: torch.dtype, trains: bool) -> None:
    """Forward, and backward where the layer trains; random numbers are drawn alike."""
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.set_grad_enabled(trains):
        torch.manual_seed(0)
        got = tensors(run(mine * 1))
        torch.manual_seed(0)
        want = tensors(eager(theirs * 1))
    for a, b in zip(got, want, strict=True):
        near(a, b, dtype)
    if not trains:
        return
    got[0].float().square().sum().backward()
    want[0].float().square().sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    near(mine.grad, theirs.grad, dtype)


def same_gradients(compiled: nn.Module, eager: nn.Module, dtype: torch.dtype) -> None:
    """The parameters' gradients, and which of them have one."""
    for (name, a), (_, b) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            near(a.grad, b.grad, dtype)


def through_the_door(compiled: nn.Module, eager: nn.Module, width: int, dtype: torch.dtype, trains: bool) -> Report:
    """The report of a compiled layer whose steps at two lengths, and gradients, are the eager one's."""
    run = torch.compile(compiled, backend="moec", dynamic=True, options={"inner": "eager", "backends": ["aten"]})
    with moec.recording() as report:
        for tokens in (6, 3):
            x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            same_step(run, eager, x, dtype, trains)
    same_gradients(compiled, eager, dtype)
    return report
