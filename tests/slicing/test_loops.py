"""Loops over experts through the ``torch.compile`` door: each is fused and right, or refused with a true reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from moec.readiness.loops import LoopChange
from tests.slicing.loop_layers import FUSED, H, Loop
from tests.slicing.loop_refusals import REFUSED

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Largest |difference| / max(1, max |value|)."""


def _tensors(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def _near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if not want.numel():
        return
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1)
    assert error <= TOLERANCE[dtype], f"off by {error:.3g}"


@pytest.mark.filterwarnings("ignore::moec.runtime.checks.MoecWarning")
@pytest.mark.parametrize("case", [*FUSED, *REFUSED], ids=lambda c: c.__name__)
def test_fused_and_right_or_refused_with_the_reason(case: type[Loop]) -> None:
    torch._dynamo.reset()
    eager, compiled = case().to(case.dtype), case().to(case.dtype)
    LoopChange(compiled, [""])
    run = torch.compile(compiled, backend="moec", dynamic=True, options={"inner": "eager", "backends": ["aten"]})
    with moec.recording() as report:
        for tokens in (6, 3):
            x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).to(case.dtype)
            mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            with torch.set_grad_enabled(case.trains):
                got, want = run(mine * 1), eager(theirs * 1)
            for a, b in zip(_tensors(got), _tensors(want), strict=True):
                _near(a, b, case.dtype)
            if not case.trains:
                continue
            _tensors(got)[0].float().square().sum().backward()
            _tensors(want)[0].float().square().sum().backward()
            assert mine.grad is not None and theirs.grad is not None
            _near(mine.grad, theirs.grad, case.dtype)
    for (name, a), (_, b) in zip(compiled.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            _near(a.grad, b.grad, case.dtype)
    reasons = [b.reason for b in report.layers]
    assert report.graphs == len(report.layers) == 1, (report.graphs, reasons)
    assert report.layers[0].fused == case.fused, reasons
    if not case.fused:
        assert case.reason and case.reason in str(reasons[0]), reasons
