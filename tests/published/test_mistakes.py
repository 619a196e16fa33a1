"""Layers that differ from a published one in one thing: never taken for it, and equal to eager or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.published.adamoe import AdaMoE
from tests.published.chain_of_experts import ChainOfExperts
from tests.published.expert_choice import ExpertChoice
from tests.published.gshard import GShard
from tests.published.harness import Tokens, compare, fused
from tests.published.moe_pp import MoEPlusPlus
from tests.published.moge import MoGE
from tests.published.multi_gate import MultiGate
from tests.published.switch import Switch
from tests.published.test_layers import LAYERS
from tests.published.top_p import TopP

CALLS = (Tokens(7, train=False), Tokens(12, skewed=True, train=False))

OTHERS: list[tuple[Callable[..., nn.Module], str]] = [
    (MoEPlusPlus, "no renormalisation"),
    (MoEPlusPlus, "zero expert keeps its gate"),
    (AdaMoE, "no renormalisation"),
    (AdaMoE, "renormalised over null experts too"),
    (TopP, "none at least"),
    (TopP, "the running sum of tokens"),
    (TopP, "renormalised"),
    (ChainOfExperts, "no inner residual"),
    (ChainOfExperts, "routed by the layer's input"),
    (Switch, "counted over experts"),
    (Switch, "one too many"),
    (Switch, "capacity depends on the branch"),
    (GShard, "second choices placed first"),
    (GShard, "normalised after the drop"),
    (ExpertChoice, "softmax over tokens"),
    (MultiGate, "no renormalisation"),
]
GROUPS = {
    "softmax in each group": "topk",
    "groups of every fourth expert": "topk",
    "first experts in a buffer": "topk",
    "first experts one apart": "topk",
    "filled with 0": "masked",
    "fewer than the groups give": "masked",
}
"""Mistakes of MoGE, and the way to write it in which they are made."""


def outputs(make: Callable[[], nn.Module]) -> list[Tensor]:
    with torch.no_grad():
        return [make()(call.make(torch.float32)) for call in CALLS]


def differ(one: Callable[[], nn.Module], other: Callable[[], nn.Module]) -> bool:
    """Equality with eager says something only where the mistake changes the numbers."""
    return any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(outputs(one), outputs(other), strict=True))


@pytest.mark.parametrize(("layer", "mistake"), OTHERS, ids=lambda v: getattr(v, "__name__", v))
def test_another_layer_keeps_its_own_meaning(layer: Callable[..., nn.Module], mistake: str) -> None:
    assert differ(lambda: layer("batched", mistake=mistake), lambda: layer("batched"))
    for block in fused(compare(lambda: layer("batched", mistake=mistake), CALLS)):
        if mistake == "no renormalisation":
            assert "renormalize" not in block.ir_after
        if mistake == "zero expert keeps its gate":
            assert "renormalize = true" in block.ir_after


@pytest.mark.parametrize("mistake", GROUPS)
def test_what_is_no_choice_per_group_is_not_taken_for_one(mistake: str) -> None:
    way = GROUPS[mistake]
    if mistake not in ("first experts in a buffer", "filled with 0"):  # these two say the same in other words
        assert differ(lambda: MoGE("batched", mistake=mistake, way=way), lambda: MoGE("batched", way=way))
    (block,) = fused(compare(lambda: MoGE("batched", mistake=mistake, way=way), CALLS[:1]))
    if mistake == "softmax in each group":  # the choice is one per group; its scores are computed before
        assert 'scoring = "identity"' in block.ir_after
    else:
        assert "per_group" not in block.ir_after, block.ir_after


@pytest.mark.parametrize(("name", "form"), [*((n, "batched") for n in LAYERS), ("top-p", "loop")])
def test_experts_that_mix_rows_stay(name: str, form: str) -> None:
    report = compare(lambda: LAYERS[name][0](form, mistake="experts mix rows"), CALLS[:1])
    assert report.layers and not any(b.fused for b in report.layers)
    assert all("may mix rows" in str(b.reason) for b in report.layers), [b.reason for b in report.layers]


def test_an_input_scaled_in_place_is_scaled_for_the_caller_too() -> None:
    """The released code of MoE++ does so between router and experts; what the caller keeps is part of the meaning."""
    assert differ(lambda: MoEPlusPlus("batched", mistake="input scaled in place"), lambda: MoEPlusPlus("batched"))
    report = compare(lambda: MoEPlusPlus("batched", mistake="input scaled in place"), CALLS[:1])
    for block in report.layers:
        assert block.fused or "overwritten" in str(block.reason), block.reason
