"""Shared experts through the ``torch.compile`` door: each is fused and right, or left with a true reason."""

from __future__ import annotations

import pytest
import torch

import moec
from tests.slicing.alike import same_gradients, same_step
from tests.slicing.custom_layers import H
from tests.slicing.shared_layers import CASES, WithShared


@pytest.mark.filterwarnings("ignore::moec.runtime.checks.MoecWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_fused_and_right_or_left_with_the_reason(case: type[WithShared]) -> None:
    torch._dynamo.reset()
    eager, compiled = case(), case()
    run = torch.compile(compiled, backend="moec", dynamic=True, options={"inner": "eager", "backends": ["aten"]})
    with moec.recording() as report:
        for tokens in (6, 3):
            x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).to(case.dtype)
            same_step(run, eager, x, case.dtype, case.trains)
    same_gradients(compiled, eager, case.dtype)
    assert report.layers and all(b.fused == bool(case.fused) for b in report.layers), report
    for block in report.layers:
        found = sorted(((s.fused, s.reason or "") for s in block.shared), reverse=True)
        assert len(found) == len(case.shared), report
        for (fused, reason), want in zip(found, case.shared, strict=True):
            assert fused == (not want) and want in reason, reason


def test_half_of_the_cases_are_left_alone() -> None:
    assert 2 * sum(case.shared != ("",) * len(case.shared) or not case.shared for case in CASES) >= len(CASES)
