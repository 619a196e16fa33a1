"""Bisecting: a planted bug is found, in no more runs than promised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from moec.backends.reference.interpreter import run_graph
from moec.ir.core import Graph, Op
from moec.ir.errors import MoecError
from moec.ir.parser import parse_graph
from moec.passes import Pass, PassClass, PassContext, PassResult, Rewrite, Rewriter, apply_rewrites
from moec.passes.bisect import bisect_pipeline
from moec.passes.calls import is_call

LENGTH = 20
TEXT = (
    "graph @g(%x: f32[4]) -> f32[4] {\n"
    + "".join(
        f"  %v{i} = torch.call @aten.{'neg' if i == 13 else 'relu'}.default(%{f'v{i - 1}' if i else 'x'}) : f32[4]\n"
        for i in range(LENGTH)
    )
    + f"  return %v{LENGTH - 1}\n}}"
)


class ReluToSigmoid(Rewrite[Op]):
    """Right for every op but the negation, which it loses."""

    name = "planted"

    def pattern(self, op: Op) -> Op | None:
        return op if is_call(op, "aten.relu.default", "aten.neg.default") else None

    def rewrite(self, match: Op, rewriter: Rewriter) -> None:
        made = rewriter.call("aten.clamp_min.default", (match.operands[0], 0), result_types=[match.result.type])
        rewriter.replace(match, [made.result])


@dataclass(frozen=True)
class Planted(Pass):
    """Has the bug."""

    name = "planted"
    pass_class = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        return apply_rewrites(graph, [ReluToSigmoid()], ctx, self.name)


@dataclass(frozen=True)
class Harmless(Pass):
    """Makes one rewrite that changes nothing that counts."""

    name = "harmless"
    pass_class = PassClass.BITWISE

    number: int = 0

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        if not ctx.take_fuel(self.name, "note"):
            return PassResult(False)
        graph.attrs[f"seen{self.number}"] = True
        return PassResult(True)


@dataclass(frozen=True)
class NoFuel(Pass):
    """Goes wrong at once and does not count its rewrites."""

    name = "no-fuel"
    pass_class = PassClass.BITWISE

    crash: bool = False

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        if self.crash:
            raise MoecError("it crashed")
        graph.terminator.set_operand(0, graph.args[0])
        return PassResult(True)


X = torch.tensor([-1.0, 0.5, 2.0, 3.0])


def is_good(graph: Graph) -> bool:
    return torch.equal(run_graph(graph, [X])[0], run_graph(parse_graph(TEXT), [X])[0])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_the_pass_and_the_rewrite_are_found(count: int, where: str) -> None:
    index = {"first": 0, "middle": count // 2, "last": count - 1}[where]
    passes: list[Pass] = [Harmless(i) for i in range(count)]
    passes[index] = Planted()
    found = bisect_pipeline(parse_graph(TEXT), passes, is_good)
    assert (found.pass_, found.index) == (Planted(), index)
    assert found.runs <= math.ceil(math.log2(count)) + 1
    assert found.fuel == index + 14, "one rewrite of each pass before, then the 14th op"
    assert found.rewrite == "planted"
    assert "%v13 = torch.call @aten.neg.default" in found.op
    assert found.fuel_runs <= math.ceil(math.log2(LENGTH)) + 1
    assert "'planted', makes it fail" in str(found)
    assert f"number {index + 14}" in str(found)


@pytest.mark.parametrize("crash", [False, True])
def test_a_pass_without_fuel_is_still_found(crash: bool) -> None:
    passes: list[Pass] = [Harmless(0), Harmless(1), NoFuel(crash), Harmless(3)]
    found = bisect_pipeline(parse_graph(TEXT), passes, is_good)
    assert (found.index, found.fuel, found.rewrite, found.fuel_runs) == (2, None, "", 0)
    assert found.runs <= 3


def test_the_input_stays_as_it_is() -> None:
    graph = parse_graph(TEXT)
    bisect_pipeline(graph, [Planted()], is_good)
    assert str(graph) == str(parse_graph(TEXT))


def test_a_good_pipeline_has_no_culprit() -> None:
    with pytest.raises(MoecError, match="nothing to find"):
        bisect_pipeline(parse_graph(TEXT), [Harmless(), Harmless()], is_good)


def test_a_bad_input_is_nobodys_fault() -> None:
    with pytest.raises(MoecError, match="bad before any pass"):
        bisect_pipeline(parse_graph(TEXT.replace("neg", "abs")), [Planted()], is_good)
