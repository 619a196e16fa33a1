"""Loops over experts through the ``torch.compile`` door: each is fused and right, or refused with a true reason."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.readiness.loops import LoopChange
from tests.slicing.alike import same_gradients, same_step
from tests.slicing.loop_layers import FUSED, H, Loop
from tests.slicing.loop_refusals import REFUSED


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
            same_step(run, eager, x, case.dtype, case.trains)
    same_gradients(compiled, eager, case.dtype)
    reasons = [b.reason for b in report.layers]
    assert report.graphs == len(report.layers) == 1, (report.graphs, reasons)
    assert report.layers[0].fused == case.fused, reasons
    if not case.fused:
        assert case.reason and case.reason in str(reasons[0]), reasons
