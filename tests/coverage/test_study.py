"""What is counted, and for which block."""

from __future__ import annotations

import pytest
import torch

from moec.coverage.families import discover, select
from moec.coverage.study import Study, layers_of, ran_in
from moec.coverage.tiny import build
from moec.report import BlockReport, Report

BLOCK = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("model.layers.1.mlp", True),
        ("model.layers.1.mlp.experts.inner", True),
        ("model.layers.1", True),  # the owner ran the GEMMs
        ("mlp", True),  # after a graph break
        ("mlp.experts", True),
        ("model.layers.0.mlp", False),
        ("model.layers.10.mlp", False),
        ("model.layers.1.mlp2", False),
        ("attention", False),
    ],
)
def test_a_block_is_known_by_its_path(name: str, same: bool) -> None:
    report = Report([BlockReport(name)])
    assert bool(layers_of(BLOCK, report)) == same
    assert ran_in(BLOCK, "moec::experts", {name: {"moec::experts": 1}}) == same
    assert not ran_in(BLOCK, "moec::experts_backward", {name: {"moec::experts": 1}})


def test_runs_are_counted_one_by_one() -> None:
    study = Study(build(select(discover(), "step3p7")[0]), ("aten",))
    study.find_inputs()
    assert (study.blocks, study.ties) == (["layers.1.mlp.experts"], 0)
    with torch.no_grad():
        runs = [study.run(study.inputs()) for _ in range(2)]
        none = study.own_breaks(study.inputs())
    assert runs[0].ran == runs[1].ran == {"layers.1.mlp": {"moec::experts": 1, "moec::route": 1}}
    assert [r.breaks for r in runs] == [none, none] == [0, 0]


def test_fresh_copies_share_nothing() -> None:
    study = Study(build(select(discover(), "mixtral")[0]), ("aten",))
    first = study.reference, study.model
    with torch.no_grad():
        for model in first:
            next(model.parameters()).zero_()
    study.fresh()
    assert all(bool(next(m.parameters()).any()) for m in (study.tiny.model, study.reference, study.model))


def test_graph_breaks_are_counted() -> None:
    class Broken(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            doubled = input_ids * 2
            torch._dynamo.graph_break()
            return doubled + 1

    study = Study(build(select(discover(), "mixtral")[0]), ("aten",))
    study.model = Broken()
    assert study.own_breaks(study.inputs()) == 1
