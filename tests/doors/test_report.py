"""The report: the same facts as objects, JSON and a table."""

from __future__ import annotations

import json

from moec.report import BlockReport, Report

FUSED = BlockReport(
    "model.layers.0.mlp",
    recognised=True,
    fused=True,
    router="softmax top-2 renorm",
    num_experts=8,
    top_k=2,
    hidden=4096,
    intermediate=14336,
    dtype="bf16",
    backend="aten",
    instances=32,
)
REFUSED = BlockReport(
    "model.layers.1.mlp",
    reason="the activation mixes rows [of other tokens]",
    source="model.py:12: h = h.cumsum(0)",
    remarks=["the activation mixes rows [of other tokens]", "missed: fuse-experts: more"],
)


def test_json_has_the_promised_keys() -> None:
    data = json.loads(Report([FUSED, REFUSED], ["note"], 3).to_json())
    assert data["graphs"] == 3
    assert data["remarks"] == ["note"]
    promised = {"name", "recognised", "fused", "reason", "router", "num_experts", "top_k", "backend"}
    assert all(promised <= set(layer) for layer in data["layers"])
    assert data["layers"][0]["reason"] is None
    assert data["layers"][0]["instances"] == 32
    assert data["layers"][1]["recognised"] is False


def test_table_says_what_and_why_not() -> None:
    text = str(Report([FUSED, REFUSED]))
    for fact in ("softmax top-2 renorm", "8 x 14336", "hidden 4096, bf16", "aten", "serves 32"):
        assert fact in text
    assert "[of other tokens]" in " ".join(text.split())  # brackets are text, not markup
    assert "missed: fuse-experts: more (model.py:12" in text
    assert text.count("missed") == 1


def test_nothing_found() -> None:
    assert str(Report()) == "no MoE block was found"
    assert str(Report(remarks=["no block: the model is dense"])) == "no block: the model is dense"
    assert not Report().all_fused


def test_all_fused() -> None:
    assert Report([FUSED]).all_fused
    assert not Report([FUSED, REFUSED]).all_fused
