"""Layers written by hand through the ``torch.compile`` door: each is fused and right, or refused with a true reason."""

from __future__ import annotations

import pytest
import torch

from tests.slicing.alike import through_the_door
from tests.slicing.custom_layers import CASES, H, Moe


@pytest.mark.filterwarnings("ignore::moec.runtime.checks.MoecWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_fused_and_right_or_refused_with_the_reason(case: type[Moe]) -> None:
    torch._dynamo.reset()
    eager, compiled = case(), case()
    report = through_the_door(compiled, eager, H, case.dtype, case.trains)
    for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b)
    fused = [b for b in report.layers if b.fused]
    reasons = [b.reason for b in report.layers]
    assert report.layers and len(fused) == (len(report.layers) if case.fused else 0), reasons
    assert len(fused) >= case.fused, reasons
    if not case.fused:
        assert any(case.reason in str(r) for r in reasons), reasons
