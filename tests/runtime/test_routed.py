"""Ids that a known router chose are not looked at again; all others are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.backends.partition import claim
from moec.ir.parser import parse_graph
from moec.lowering import lowering
from moec.options import CompileOptions
from moec.runtime import ops, programs
from moec.runtime.checks import CheckError
from moec.runtime.programs import Program

BLOCK = """
graph @block(%l: f32[T, {routed}], %given: i64[T, 2], %x: f32[T, 8],
             %up: f32[4, 8, 8], %down: f32[4, 8, 4]) -> f32[T, 8] {{
  %w, %ids = moe.route %l {{k = 2}}{region} : f32[T, 2], i64[T, 2]
  %y = moe.experts %x, {ids}, %w, [%up], [%down] {{experts = 4}} {{
    (%g: f32[R, 4], %u: f32[R, 4]) -> f32[R, 4] {{
      %m = torch.call @aten.mul.Tensor(%g, %u) : f32[R, 4]
      return %m
    }}
  }} : f32[T, 8]
  return %y
}}
"""
REGION = """ {
    @router(%v: f32[T, 4]) -> (f32[T, 2], i64[T, 2]) {
      %a, %b = torch.call @aten.topk.default(%v, 2) : f32[T, 2], i64[T, 2]
      %c = torch.call @aten.add.Tensor(%b, 1) : i64[T, 2]
      return %a, %c
    }
  }"""


def program(**changes: str) -> Program:
    graph = parse_graph(BLOCK.format(**{"ids": "%ids", "region": "", "routed": "4"} | changes))
    op = next(op for op in graph.ops if op.name == "moe.experts")
    fx = torch.fx.Graph()
    args: list[Any] = [fx.placeholder(f"a{i}") for i in range(len(op.operands))]
    (call,) = lowering(claim(graph, ("aten",)), CompileOptions())(op, fx, args) or [None]
    return programs.lookup(call.args[-1])


def run(made: Program, ids: torch.Tensor) -> torch.Tensor:
    x, w = torch.randn(3, 8), torch.rand(3, 2)
    return ops._experts(x, ids, w, [torch.randn(4, 8, 8), torch.randn(4, 8, 4)], made.key)


@pytest.mark.parametrize("changes", [{"ids": "%given"}, {"region": REGION}, {"routed": "5"}], ids=str)
def test_ids_of_anybody_else_are_checked(changes: dict[str, str]) -> None:
    made = program(**changes)
    assert not made.routed
    with pytest.raises(CheckError, match="expert id 4 is out of range"):
        run(made, torch.full((3, 2), 4))


def test_ids_of_a_router_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program()
    assert made.routed
    assert made.checks == "warn"
    monkeypatch.setattr(ops.checks, "check_ids", lambda *a: pytest.fail("looked at"))
    run(made, torch.tensor([[0, 1], [2, 3], [3, 0]]))


def test_another_process_knows_it_too() -> None:
    made = program()
    programs.clear()
    again = programs.lookup(made.key)
    assert again is not made
    assert (again.routed, again.checks, again.text) == (True, "warn", made.text)
