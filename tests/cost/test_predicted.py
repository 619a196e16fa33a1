"""Predictions in a report: as data, as a table, and only where they mean something."""

from __future__ import annotations

import dataclasses
import json

import pytest

import moec.predicted
from moec.cost import LayerShape, predict
from moec.predicted import TOKENS, add_predictions
from moec.predicted_table import predicted_table
from moec.report import BlockReport, Report
from tests.cost.machines import round_machine

BLOCK = BlockReport(
    "model.layers.0.mlp", recognised=True, fused=True, num_experts=8, top_k=2, hidden=64, intermediate=128,
    projections=2, dtype="bf16", backend="cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moec.predicted, "machine_for", lambda target: round_machine())


def block(**changes: object) -> BlockReport:
    return dataclasses.replace(BLOCK, predicted=[], **changes)  # type: ignore[arg-type]


def test_predictions_are_the_cost_models() -> None:
    report = Report([block()])
    add_predictions(report, "cpu:avx2", 2)
    data = json.loads(report.to_json())["layers"][0]["predicted"]
    assert [p["tokens"] for p in data] == list(TOKENS)
    want = predict(LayerShape(64, 128, 64, 8, 2), 256, round_machine(), 2, "avx2")
    found = next(p for p in data if p["tokens"] == 256)
    assert {k: found[k] for k in dataclasses.asdict(want)} == dataclasses.asdict(want)
    assert (found["threads"], found["isa"], found["calibrated"]) == (2, "avx2", True)


def test_instructions_that_were_not_measured_are_called_defaults() -> None:
    report = Report([block()])
    add_predictions(report, "cpu:avx512", 1)
    assert not report.layers[0].predicted[0]["calibrated"]
    assert "defaults; `moec profile`" in " ".join(str(report).split())


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("cuda:sm90", {}),
        ("cpu:neon", {}),
        ("cpu:avx2", {"fused": False}),
        ("cpu:avx2", {"hidden": None}),
        ("cpu:avx2", {"dtype": "f64"}),
    ],
)
def test_nothing_is_predicted_where_nothing_is_known(target: str, changes: dict[str, object]) -> None:
    report = Report([block(**changes)])
    add_predictions(report, target, 2)
    assert report.layers[0].predicted == []
    assert predicted_table(report.layers) is None
    assert "predicted" not in str(report)


def test_equal_layers_share_their_rows() -> None:
    layers = [block(), block(name="model.layers.1.mlp"), block(name="other", hidden=128)]
    report = Report(layers)
    add_predictions(report, "cpu:avx2", 2)
    text = str(report)
    table = text[text.index("predicted (calibrated)") :]
    assert "model.layers.0.mlp (and 1 more)" in table
    assert "model.layers.1.mlp" not in table
    assert "other" in table
    assert sum(line.count(" 4096 ") for line in table.splitlines()) == 2
    made = predicted_table(layers)
    assert made is not None
    assert made.row_count == 2 * len(TOKENS)
