"""Shared experts through the ``torch.compile`` door: each is fused and right, or left with a true reason."""

from __future__ import annotations

import pytest
import torch

from tests.slicing.alike import through_the_door
from tests.slicing.custom_layers import H
from tests.slicing.shared_layers import CASES, WithShared


@pytest.mark.filterwarnings("ignore::moec.runtime.checks.MoecWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_fused_and_right_or_left_with_the_reason(case: type[WithShared]) -> None:
    torch._dynamo.reset()
    eager, compiled = case(), case()
    report = through_the_door(compiled, eager, H, case.dtype, case.trains)
    assert report.layers and all(b.fused == bool(case.fused) for b in report.layers), report
    for block in report.layers:
        found = sorted(((s.fused, s.reason or "") for s in block.shared), reverse=True)
        assert len(found) == len(case.shared), report
        for (fused, reason), want in zip(found, case.shared, strict=True):
            assert fused == (not want) and want in reason, reason


def test_half_of_the_cases_are_left_alone() -> None:
    assert 2 * sum(case.shared != ("",) * len(case.shared) or not case.shared for case in CASES) >= len(CASES)
