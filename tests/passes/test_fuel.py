"""Fuel stops the MoE passes rewrite by rewrite, so that a harmful one can be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.ir.parser import parse_graph
from moec.passes.base import PassContext
from moec.passes.manager import PassManager

RAISED = (Path(__file__).parents[1] / "ir" / "golden" / "mixtral_raised.moe").read_text()


def names(fuel: int | None) -> list[str]:
    graph = parse_graph(RAISED)
    ctx = PassContext()
    PassManager("fuse-routing,fuse-experts", fuel=fuel, repro=None).run(graph, ctx)
    assert len([r for r in ctx.remarks if r.kind == "applied"]) == ctx.fuel.spent
    return [op.name for op in graph.ops if op.dialect == "moe"]


@pytest.mark.parametrize(
    ("fuel", "expected"),
    [
        (0, ["moe.dispatch", "moe.grouped_gemm", "moe.activation", "moe.grouped_gemm", "moe.combine"]),
        (1, ["moe.route", "moe.dispatch", "moe.grouped_gemm", "moe.activation", "moe.grouped_gemm", "moe.combine"]),
        (2, ["moe.route", "moe.experts"]),
        (None, ["moe.route", "moe.experts"]),
    ],
)
def test_fuel_allows_that_many_rewrites(fuel: int | None, expected: list[str]) -> None:
    assert names(fuel) == expected
