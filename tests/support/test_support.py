"""The references are held to something too: a reference that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import FAMILIES, build, inputs
from tests.support.routing import FP32_LOGITS_TOLERANCE, compare_logits, near_tie_tokens, reference_experts

LAYER_TOLERANCE = 1e-5  # fp32 against fp64


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_agrees_with_transformers_and_notices_a_wrong_weight(family: str) -> None:
    experts = next(m for m in build(family).modules() if type(m).__name__.endswith("Experts"))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(13, 64, generator=generator)
    ids = torch.rand(13, 8, generator=generator).topk(3).indices
    ids[:, 0], ids[ids == 5] = 7, 1  # one expert takes a choice of every token, one takes none
    weights = torch.rand(13, 3, generator=generator)
    with torch.no_grad():
        want = reference_experts(experts, x, ids, weights)
        torch.testing.assert_close(experts(x, ids, weights).double(), want, rtol=0, atol=LAYER_TOLERANCE)
        experts.down_proj[7, 0, 0] += 0.1
        assert (reference_experts(experts, x, ids, weights) - want).abs().max() > LAYER_TOLERANCE
        assert torch.count_nonzero(reference_experts(experts, x, torch.full_like(ids, 8), weights)) == 0


def test_models_are_the_same_each_time_and_misspellings_are_told() -> None:
    assert torch.equal(build("gpt_oss").lm_head.weight, build("gpt_oss").lm_head.weight)
    assert build("mixtral", layers=3, num_local_experts=4).model.layers[2].mlp.experts.down_proj.shape[0] == 4
    with pytest.raises(KeyError, match="num_local_experts"):
        build("mixtral", num_local_expert=4)
    with pytest.raises(KeyError, match="mixtral"):
        build("mixtrl")


def test_near_ties_are_found_where_two_experts_are_the_same() -> None:
    model = build("mixtral")
    batch = inputs("mixtral", 2, 50)
    assert near_tie_tokens(model, **batch).sum() == 0
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate.weight
        gate[3] = gate[5]
    ties = near_tie_tokens(model, **batch)
    assert 0 < ties.sum() < 100  # where one of the two is just chosen and the other just not


def test_compare_logits_sets_near_ties_apart_and_nothing_else() -> None:
    want = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0))
    ties = torch.zeros(100, dtype=torch.bool)
    ties[40] = True
    for position, passes in ((40, True), (41, False), (39, False)):
        got = want.clone()
        got[0, position] += 10.0
        if passes:
            assert compare_logits(got, want, ties=ties).near_ties == 1
        else:
            with pytest.raises(AssertionError):
                compare_logits(got, want, ties=ties)
    assert compare_logits(want, want).max_error == 0.0
    assert compare_logits(want[:, :0], want[:, :0]).tokens == 0
    with pytest.raises(AssertionError, match="differ by more"):
        compare_logits(want + 20 * FP32_LOGITS_TOLERANCE, want)
    with pytest.raises(AssertionError, match="not finite"):
        compare_logits(torch.full_like(want, float("nan")), want)
    with pytest.raises(AssertionError, match="too many near ties"):
        compare_logits(want, want, ties=torch.ones(100, dtype=torch.bool))
