"""Layers written by hand through the ``torch.compile`` door: each is fused and right, or refused with a true reason."""

from __future__ import annotations

import pytest
import torch

import moec
from tests.slicing.alike import same_gradients, same_step
from tests.slicing.custom_layers import CASES, H, Moe


@pytest.mark.filterwarnings("ignore::moec.runtime.checks.MoecWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_fused_and_right_or_refused_with_the_reason(case: type[Moe]) -> None:
    torch._dynamo.reset()
    eager, compiled = case(), case()
    run = torch.compile(compiled, backend="moec", dynamic=True, options={"inner": "eager", "backends": ["aten"]})
    with moec.recording() as report:
        for tokens in (6, 3):
            x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).to(case.dtype)
            same_step(run, eager, x, case.dtype, case.trains)
    same_gradients(compiled, eager, case.dtype)
    for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b)
    fused = [b for b in report.layers if b.fused]
    reasons = [b.reason for b in report.layers]
    assert report.layers and len(fused) == (len(report.layers) if case.fused else 0), reasons
    assert len(fused) >= case.fused, reasons
    if not case.fused:
        assert any(case.reason in str(r) for r in reasons), reasons
