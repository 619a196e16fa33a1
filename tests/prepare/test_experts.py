"""Every experts module is counted: the ones that follow transformers' interface are set, the others are named."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import moec
from moec import MoecError
from moec.readiness import prepare
from tests.support.models import FAMILIES, build, inputs

SAME_FUNCTION = 1e-5  # eager loop against grouped_mm in fp32: sums of the same products in another order


class Router(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class HandWrittenExperts(nn.Module):
    """Runs experts in its own way; knows nothing of any interface."""

    def __init__(self, experts: int = 4, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, width))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return x


class ListOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Router()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)


def snapshot(model: nn.Module) -> list[dict[str, object]]:
    """Identity of everything that hangs on the model's modules."""
    return [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_sets_every_family_and_undo_restores(family: str) -> None:
    model = build(family, implementation="eager", layers=4)
    before = snapshot(model)
    with torch.no_grad():
        want = model(**inputs(family, 2, 7)).logits
        report = prepare(model)
        got = model(**inputs(family, 2, 7)).logits
    assert report.found == report.will_use == len(report.experts) == 4
    assert {site.before for site in report.experts} == {"eager"}
    assert not report.ignored
    assert model.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(got, want, rtol=0, atol=SAME_FUNCTION)
    report.undo()
    assert model.config._experts_implementation == "eager"
    assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs(family, 2, 7)).logits, want)


def test_preparing_again_changes_nothing_and_undo_goes_all_the_way_back() -> None:
    model = build("mixtral", implementation="eager", layers=4)
    before = snapshot(model)
    first = prepare(model)
    second = prepare(model)
    assert second.to_dict() == first.to_dict()
    first.undo()  # overtaken by the second: no longer responsible
    assert model.config._experts_implementation == "grouped_mm"
    second.undo()
    second.undo()
    assert model.config._experts_implementation == "eager"
    assert snapshot(model) == before


def test_the_function_can_be_reached_twice_through_the_package() -> None:
    model = build("mixtral")
    assert moec.prepare(model).found == 2
    assert moec.prepare(model).found == 2


def test_an_undecorated_experts_module_is_named() -> None:
    model = build("mixtral", layers=2)
    model.model.layers[1].mlp.experts = HandWrittenExperts()
    report = prepare(model)
    assert (report.found, report.will_use) == (2, 1)
    assert [left.name for left in report.ignored] == ["model.layers.1.mlp.experts"]
    assert "does not ask the experts interface" in report.ignored[0].reason


def test_a_subclass_with_its_own_forward_is_named() -> None:
    model = build("mixtral", layers=2)
    experts = model.model.layers[0].mlp.experts

    class Overriding(type(experts)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return x

    experts.__class__ = Overriding
    report = prepare(model)
    assert (report.found, report.will_use) == (2, 1)
    assert [left.name for left in report.ignored] == ["model.layers.0.mlp.experts"]


def test_a_list_of_experts_is_named_once() -> None:
    report = prepare(nn.Sequential(ListOfExperts(), nn.Linear(8, 8)))
    assert [left.name for left in report.ignored] == ["0"]
    assert report.experts == []
    assert "no module follows" in report.notes[0]


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
def test_a_model_without_experts_is_left_alone(model: nn.Module) -> None:
    before = snapshot(model)
    report = prepare(model)
    assert report.found == 0
    assert report.notes == ["the model has no experts: nothing was changed"]
    assert snapshot(model) == before
    report.undo()


def test_a_locked_implementation_is_left_with_a_reason() -> None:
    model = build("mixtral", layers=2)
    model.config._experts_implementation_internal = "deepgemm_megamoe"
    report = prepare(model)
    assert (report.found, report.will_use) == (2, 0)
    assert all(site.reason and "cannot be switched" in site.reason for site in report.experts)
    assert model.config._experts_implementation == "deepgemm_megamoe"


def test_none_leaves_the_implementation() -> None:
    model = build("mixtral", implementation="batched_mm")
    report = prepare(model, implementation=None)
    assert model.config._experts_implementation == "batched_mm"
    assert [site.after for site in report.experts] == ["batched_mm", "batched_mm"]


def test_unknown_implementation_names_the_nearest_and_changes_nothing() -> None:
    model = build("mixtral", implementation="eager", layers=4)
    before = snapshot(model)
    with pytest.raises(MoecError, match="groupd_mm") as caught:
        prepare(model, implementation="groupd_mm")
    assert "'grouped_mm'" in str(caught.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("arguments", [("model", {}), (nn.Linear(2, 2), {"regions": "always"})])
def test_bad_arguments(arguments: tuple[object, dict[str, object]]) -> None:
    with pytest.raises(MoecError):
        prepare(arguments[0], **arguments[1])  # type: ignore[arg-type]


def test_the_report_prints_and_serialises() -> None:
    model = build("mixtral", layers=4)
    model.model.layers[3].mlp.experts = HandWrittenExperts()
    report = prepare(model)
    data = json.loads(report.to_json())
    assert (data["found"], data["will_use"]) == (4, 3)
    assert data["ignored"][0]["name"] == "model.layers.3.mlp.experts"
    console = Console(width=200, record=True)
    console.print(report)
    for text in (console.export_text(), str(report)):
        assert "3 of 4 experts modules use grouped_mm" in text
        assert "model.layers.3.mlp.experts" in text
