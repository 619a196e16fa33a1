"""Layers written by hand through the ``torch.compile`` door: each is fused and right, or refused with a true reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from tests.slicing.custom_layers import CASES, H, Moe

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Largest |difference| / max(1, max |value|)."""


def _tensors(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def _near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if not want.dtype.is_floating_point or not want.numel():
        assert got.equal(want)
        return
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1)
    assert error <= TOLERANCE[dtype], f"off by {error:.3g}"


@pytest.mark.filterwarnings("ignore::moec.runtime.checks.MoecWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_fused_and_right_or_refused_with_the_reason(case: type[Moe]) -> None:
    torch._dynamo.reset()
    eager, compiled = case(), case()
    run = torch.compile(compiled, backend="moec", dynamic=True, options={"inner": "eager", "backends": ["aten"]})
    with moec.recording() as report:
        for tokens in (6, 3):
            x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).to(case.dtype)
            mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            with torch.set_grad_enabled(case.trains):
                torch.manual_seed(0)
                got = run(mine * 1)
                torch.manual_seed(0)
                want = eager(theirs * 1)
            for a, b in zip(_tensors(got), _tensors(want), strict=True):
                _near(a, b, case.dtype)
            if not case.trains:
                continue
            _tensors(got)[0].sum().backward()
            _tensors(want)[0].sum().backward()
            assert mine.grad is not None and theirs.grad is not None
            _near(mine.grad, theirs.grad, case.dtype)
    for (name, a), (_, b) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            _near(a.grad, b.grad, case.dtype)
    for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b)
    fused = [b for b in report.layers if b.fused]
    reasons = [b.reason for b in report.layers]
    assert report.layers and len(fused) == (len(report.layers) if case.fused else 0), reasons
    assert len(fused) >= case.fused, reasons
    if not case.fused:
        assert any(case.reason in str(r) for r in reasons), reasons
