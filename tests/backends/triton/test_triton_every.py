"""What every backend is held to, in Triton's interpreter: some of the cases here, all of them with ``-m slow``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from moec.backends.registry import get_backend
from tests.backends import test_every_backend as every
from tests.backends.cases import ExpertsCase, case_id

pytestmark = pytest.mark.usefixtures("interpreter")
BACKEND = get_backend("triton")
FEW_TOKENS, FEW_SKEWS = (0, 1, 33), every.SKEWS[:1]
QUICK = (
    ExpertsCase(layout="interleaved", bias=True, dtype="bf16", weight_dtype="f32"),
    ExpertsCase(layout="rows", up_form="kn", down_form="kn", bias=True, dtype="f32"),
    ExpertsCase(sentinels=True, layout="separate", stacked=False, dtype="bf16"),
    ExpertsCase(captures=True, post=True),
)
"""Between them: all kinds of weights, both forms, epilogues and functions of rows, two types, ids that go nowhere."""


def quickly(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """All values as parameters, slow but for some."""
    return [pytest.param(v, marks=() if v in quick else pytest.mark.slow) for v in values]


def test_the_quick_ones_are_cases() -> None:
    assert all(case in every.CASES for case in QUICK)


@pytest.mark.parametrize("case", QUICK, ids=case_id)
def test_experts(case: ExpertsCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every, "TOKENS", FEW_TOKENS)
    monkeypatch.setattr(every, "SKEWS", FEW_SKEWS)
    every.test_experts_agree_with_the_reference(BACKEND, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", every.CASES, ids=case_id)
def test_all_experts(case: ExpertsCase) -> None:
    every.test_experts_agree_with_the_reference(BACKEND, case)


@pytest.mark.parametrize("name", quickly(every.ROUTERS, ("softmax_renorm_bf16", "sigmoid_groups")))
def test_routers(name: str) -> None:
    every.test_routers_agree_with_the_reference(BACKEND, name)


def test_bits() -> None:
    every.test_the_same_input_gives_the_same_bits(BACKEND)


def test_gradients() -> None:
    every.test_gradients_agree_with_the_reference(BACKEND)
