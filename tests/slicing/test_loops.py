"""Loops over experts through the ``torch.compile`` door: each is fused and right, or refused with a true reason."""

from __future__ import annotations

import pytest
import torch

from moec.readiness.loops import LoopChange
from tests.slicing.alike import through_the_door
from tests.slicing.loop_layers import FUSED, H, Loop
from tests.slicing.loop_refusals import REFUSED


@pytest.mark.filterwarnings("ignore::moec.runtime.checks.MoecWarning")
@pytest.mark.parametrize("case", [*FUSED, *REFUSED], ids=lambda c: c.__name__)
def test_fused_and_right_or_refused_with_the_reason(case: type[Loop]) -> None:
    torch._dynamo.reset()
    eager, compiled = case().to(case.dtype), case().to(case.dtype)
    LoopChange(compiled, [""])
    report = through_the_door(compiled, eager, H, case.dtype, case.trains)
    reasons = [b.reason for b in report.layers]
    assert report.graphs == len(report.layers) == 1, (report.graphs, reasons)
    assert report.layers[0].fused == case.fused, reasons
    if not case.fused:
        assert case.reason and case.reason in str(reasons[0]), reasons
