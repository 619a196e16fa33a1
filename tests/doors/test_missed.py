"""``explain`` lists every MoE module of a model, those that no graph shows included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moec
from tests.support import models

TOKENS = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(0))


class LoopedLayer(nn.Module):
    """A user's own MoE layer: a list of experts and a Python loop over those that were hit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            rows, slot = torch.where(ids == e)
            out[rows] += self.experts[e](x[rows]) * weights[rows, slot, None]
        return out


def test_a_python_loop_over_experts_is_listed_with_what_to_do() -> None:
    model = models.build("mixtral", implementation="eager")
    report = moec.explain(model, kwargs={"input_ids": TOKENS})
    assert [b.name for b in report.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert not any(b.recognised or b.fused for b in report.layers)
    assert all("moec.prepare" in (b.reason or "") and "modeling_mixtral.py" in (b.source or "") for b in report.layers)


def test_a_layer_of_ones_own_is_listed_with_its_class() -> None:
    report = moec.explain(nn.Sequential(nn.Linear(8, 8), LoopedLayer()), (torch.randn(5, 8),))
    (block,) = report.layers
    assert block.name == "1" and not block.recognised
    assert "list of experts" in (block.reason or "") and "class LoopedLayer" in (block.source or "")


def test_blocks_that_are_found_are_listed_once() -> None:
    report = moec.explain(models.build("mixtral"), kwargs={"input_ids": TOKENS})
    assert [(b.name, b.fused) for b in report.layers] == [("model.layers.0.mlp", True), ("model.layers.1.mlp", True)]


def test_a_model_without_experts_has_no_block() -> None:
    report = moec.explain(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert report.layers == [] and report.remarks


class Broken(nn.Module):
    """A graph break inside every layer: names of what comes after it begin at the layer."""

    def __init__(self, fused: int) -> None:
        super().__init__()
        layers = models.build("mixtral").model.layers
        self.layers = nn.ModuleList(BrokenLayer(layer.mlp) for layer in layers)
        for layer in self.layers[fused:]:
            layer.mlp.experts.config = copy.copy(layer.mlp.experts.config)
            layer.mlp.experts.config._experts_implementation_internal = "eager"

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class BrokenLayer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + self.mlp(x)


@pytest.mark.parametrize("fused", [2, 1])
def test_blocks_after_a_graph_break_are_not_missed_and_others_are(fused: int) -> None:
    model = Broken(fused)
    x = torch.randn(1, 6, models.build("mixtral").config.hidden_size)
    report = moec.explain(model, (x,), inner="eager")
    assert any(b.fused for b in report.layers)
    missed = [b for b in report.layers if not b.fused]
    assert len(missed) == 2 - fused and all("moec.prepare" in (b.reason or "") for b in missed)
