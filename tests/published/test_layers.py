"""Published layers through the ``torch.compile`` door: one graph, experts fused, the same numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moec.passes.pipelines import PIPELINES
from tests.published.adamoe import AdaMoE
from tests.published.chain_of_experts import ROUNDS, ChainOfExperts
from tests.published.expert_choice import ExpertChoice
from tests.published.gshard import GShard
from tests.published.harness import CALLS, Tokens, compare, fused
from tests.published.moe_pp import MoEPlusPlus
from tests.published.moge import MoGE
from tests.published.multi_gate import TASKS, DenseMixture, MultiGate
from tests.published.switch import Switch
from tests.published.top_p import TopP

LAYERS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "MoE++": (MoEPlusPlus, 2),
    "AdaMoE": (AdaMoE, 1),
    "top-p": (TopP, 1),
    "MoGE": (MoGE, 1),
    "chain-of-experts": (ChainOfExperts, ROUNDS),
    "Switch": (Switch, 1),
    "GShard": (GShard, 1),
    "expert choice": (ExpertChoice, 1),
    "several gates": (MultiGate, TASKS),
}
"""The layer, and how many blocks it has."""
DROPS = {"MoE++", "AdaMoE", "top-p", "Switch", "GShard"}
"""Some slots of these have weight 0."""
ROUTERS = {
    "MoE++": "moe.route %", "AdaMoE": "moe.route %", "top-p": "moe.route %",
    "MoGE": "groups = 4, per_group = 1, by_group = true", "chain-of-experts": "{k = 2}",
    "Switch": 'ties = "first"', "GShard": "moe.route %", "several gates": "renormalize = true",
}  # fmt: skip
"""What the IR says of the router. Expert choice has none: its top-k runs over tokens."""
ELIMINATES = "eliminate-zero-experts" in PIPELINES["default"]


@pytest.mark.parametrize("name", LAYERS)
def test_gemms_of_indexed_weights(name: str) -> None:
    make, blocks = LAYERS[name]
    found = fused(compare(lambda: make("batched")))
    assert len(found) % blocks == 0, [b.name for b in found]
    for block in found:
        assert ROUTERS.get(name, "") in block.ir_after, block.ir_after
        assert ("then torch calls" in str(block.router)) == (name in DROPS), block.router
        if name in DROPS and ELIMINATES:
            assert "sentinels = true" in block.ir_after, block.ir_after
        if name not in DROPS:
            assert "sentinels" not in block.ir_after, block.ir_after


@pytest.mark.parametrize("name", LAYERS)
def test_a_loop_over_modules(name: str) -> None:
    make, blocks = LAYERS[name]
    found = fused(compare(lambda: make("loop"), CALLS if name in ("AdaMoE", "Switch") else CALLS[:2]))
    assert len(found) % blocks == 0
    for block in found:
        assert "aten.where.default" not in block.ir_after, "no step of the loop is left"
        if name != "expert choice":
            assert ROUTERS[name] in block.ir_after, block.ir_after


@pytest.mark.parametrize("name", LAYERS)
def test_grouped_gemms_in_bf16(name: str) -> None:
    """The routers compute in f32 and are not touched, so both sides choose the same experts."""
    make, blocks = LAYERS[name]
    found = fused(compare(lambda: make("grouped", torch.bfloat16), [Tokens(13)], dtype=torch.bfloat16))
    assert len(found) == blocks


@pytest.mark.parametrize(("way", "each"), [("topk", 1), ("topk", 2), ("max", 1), ("masked", 1), ("masked", 2)])
def test_every_way_to_write_groups_of_equal_load(way: str, each: int) -> None:
    (block,) = fused(compare(lambda: MoGE("batched", way=way, per_group=each), CALLS[1:2]))
    assert f"groups = 4, per_group = {each}" in block.ir_after, block.ir_after
    assert ("by_group = true" in block.ir_after) == (way != "masked")


def test_a_dense_mixture_stays_dense() -> None:
    report = compare(DenseMixture, CALLS[:1])
    assert not report.layers
    assert any("no MoE block" in r for r in report.remarks)
