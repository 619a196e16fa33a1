"""When two runs are equal, and when comparing them would say nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from moec.coverage.compare import TIE_MARGIN, error_of, gradient_error, near_ties, output_of, ties_in, worse


def test_errors_are_relative_to_the_largest_value() -> None:
    want = torch.tensor([[1.0, -100.0]])
    assert error_of(want + 1e-3, want) == pytest.approx(1e-5, rel=1e-2)
    assert error_of(torch.tensor([0.1]), torch.tensor([0.2])) == pytest.approx(0.5)
    assert error_of(want, want) == 0.0
    assert error_of(want[:, :1], want) == math.inf
    assert error_of(want * math.nan, want) == math.inf
    assert error_of(want, want * math.inf) == math.inf


def test_the_worst_gradient_is_named() -> None:
    want = {"a": torch.ones(2), "b": torch.full((2,), 100.0)}
    error, where = gradient_error({"a": torch.tensor([1.0, 1.5]), "b": want["b"] + 1}, want)
    assert where == "a"
    assert error == pytest.approx(0.5)
    assert gradient_error({"a": want["a"]}, want) == (1.0, "b")
    assert gradient_error({**want, "c": torch.zeros(3)}, want) == (0.0, "")
    assert gradient_error({**want, "c": torch.ones(3)}, want)[1] == "c"
    assert gradient_error({"a": want["a"] * math.nan, "b": want["b"]}, want) == (math.inf, "a")


def test_a_gradient_that_is_rounding_itself_is_not_held_against_anyone() -> None:
    want = {"big": torch.ones(2), "faint": torch.full((2,), 1e-9)}
    error, _ = gradient_error({"big": want["big"], "faint": torch.zeros(2)}, want)
    assert error < 1e-4


def test_near_ties_are_counted_where_a_choice_ends() -> None:
    gap = TIE_MARGIN / 2
    scores = torch.tensor([[1.0, 0.5, 0.5 - gap, 0.0], [1.0, 0.5, 0.4, 0.4], [1.0, 1.0, 0.5, 0.0]])
    assert [near_ties(scores, k) for k in (1, 2, 3)] == [1, 1, 1]
    for refused in (-math.inf, torch.finfo(torch.float32).min):
        masked = torch.tensor([[1.0, 0.5, refused, refused]])
        assert [near_ties(masked, k) for k in (1, 2, 3)] == [0, 0, 0]


def test_ties_of_a_model_are_those_of_its_choices() -> None:
    class Router(torch.nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            top = scores.topk(1, dim=-1).values + scores.max(dim=-1, keepdim=True).values
            return top + scores.argmax(dim=-1, keepdim=True)

    assert ties_in(Router(), {"scores": torch.tensor([[1.0, 1.0, 0.0]])}, 1) == 3
    assert ties_in(Router(), {"scores": torch.tensor([[1.0, 0.9, 0.0]])}, 1) == 0
    assert ties_in(Router(), {"scores": torch.tensor([[1.0, 1.0, 0.0]])}, 2) == 0  # not one row a token: attention
    assert ties_in(Router(), {"scores": torch.tensor([[1, 1, 0]])}, 1) == 0  # whole numbers are no scores


def test_a_model_is_judged_by_its_logits() -> None:
    logits, hidden = torch.ones(1), torch.zeros(1)
    assert output_of(SimpleNamespace(logits=logits, last_hidden_state=hidden)) is logits
    assert output_of(SimpleNamespace(logits=None, last_hidden_state=hidden)) is hidden
    assert output_of(SimpleNamespace(feature_maps=(hidden, logits))) is logits


def test_a_gradient_that_eager_itself_rounds_badly_is_judged_by_float64() -> None:
    exact = {"a": torch.tensor([1.0], dtype=torch.float64)}
    near, far = ({"a": torch.tensor([1.0 + error])} for error in (2e-3, 1e-2))
    assert not worse(near, far, exact)
    assert not worse({"a": torch.tensor([1.0 - 1e-2])}, far, exact)
    assert worse(far, near, exact)
    assert worse({"a": torch.tensor([math.nan])}, far, exact)
