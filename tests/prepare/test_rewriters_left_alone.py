"""Modules that look like ones that a rewriter knows and are not, or not now: left as they are, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moec.readiness import prepare
from moec.readiness.rewriters import is_rewritten
from tests.prepare.undecorated import HIDDEN, INNER, block, modeling, tokens


def left(module: nn.Module) -> str:
    """The one reason why nothing of ``module`` was rewritten."""
    report = prepare(module)
    assert not report.rewritten
    assert not any(is_rewritten(m) for m in module.modules())
    (only,) = report.ignored
    return only.reason


def test_a_subclass_is_left_alone() -> None:
    module = block("step3p7")

    class Own(type(module.experts)):  # type: ignore[misc]
        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            return hidden_states

    module.experts.__class__ = Own
    assert "derives from Step3p7Experts" in left(module)


def test_a_class_of_the_same_name_from_elsewhere_is_left_alone() -> None:
    class LongcatFlashExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 4
            self.up = nn.Parameter(torch.zeros(4, 2, 2))

        def forward(self, x: Any) -> Any:
            return x

    assert "does not ask the experts interface" in left(nn.Sequential(LongcatFlashExperts()))


def test_a_class_that_its_module_no_longer_holds_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = block("dbrx")
    monkeypatch.setattr(modeling("dbrx"), "DbrxExperts", nn.Linear)
    assert "not the one that transformers.models.dbrx.modeling_dbrx holds" in left(module)


def test_a_patched_class_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = modeling("dbrx").DbrxExpertGLU
    own = kind.forward

    def forward(self: Any, x: Any, w1: Any, v1: Any, w2: Any) -> Any:
        return own(self, x, w1, v1, w2) * 2

    monkeypatch.setattr(kind, "forward", forward)
    assert "DbrxExpertGLU.forward is not written as moec knows it" in left(block("dbrx"))


@pytest.mark.parametrize(
    ("family", "inside"),
    [("llama4", "experts"), ("dbrx", "experts.mlp"), ("switch_transformers", "experts.expert_2.wi")],
)
def test_hooks_on_experts_are_kept(family: str, inside: str) -> None:
    module = block(family)
    module.get_submodule(inside).register_forward_hook(lambda m, args, out: out * 2)
    assert "forward hook" in left(module)


def test_hooks_on_the_rewritten_module_still_run() -> None:
    module = block("step3p7")
    seen = []
    module.experts.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    assert len(prepare(module).rewritten) == 1
    module(tokens())
    assert seen == [(14, HIDDEN)]


def test_a_forward_replaced_on_the_instance_is_kept() -> None:
    module = block("jetmoe")
    own = module.forward
    module.forward = lambda x: own(x) + 1
    assert "forward was replaced" in left(module)


def test_other_layers_in_an_expert_are_kept() -> None:
    class Adapted(nn.Linear):
        pass

    module = block("nllb_moe")
    module.experts.expert_1.fc2 = Adapted(INNER, HIDDEN)
    assert "experts.expert_1.fc2 is a Adapted, where a Linear is known" in left(module)


def test_experts_that_differ_are_kept() -> None:
    module = block("switch_transformers")
    module.experts.expert_1.wi = nn.Linear(HIDDEN, INNER, bias=True)
    assert "differ in shape, type or bias" in left(module)


def test_tensor_subclasses_are_kept() -> None:
    class Sharded(torch.Tensor):
        pass

    module = block("longcat_flash")
    weight = module.experts.down_proj.detach().as_subclass(Sharded)
    module.experts._parameters["down_proj"] = weight
    assert "down_proj is a Sharded" in left(module)


def test_no_real_experts() -> None:
    assert "no experts but identity experts" in left(block("longcat_flash", n_routed_experts=0))


def test_product_keys_and_data_sets_are_no_grouped_gemm() -> None:
    from transformers.models.doge import modeling_doge as doge
    from transformers.models.vitpose_backbone import modeling_vitpose_backbone as vitpose

    config = doge.DogeConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_experts=16, num_experts_per_tok=2)
    assert "product keys" in left(nn.ModuleList([doge.DogeCDMoE(config)]))
    backbone = vitpose.VitPoseBackboneConfig(hidden_size=HIDDEN, num_experts=3, part_features=4)
    assert "data set" in left(nn.ModuleList([vitpose.VitPoseBackboneMoeMLP(backbone)]))
