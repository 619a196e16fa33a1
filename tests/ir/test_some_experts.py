"""Ops on some of a rank's experts: what they mean by loops, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from moec.backends.reference import run_graph
from moec.ir.errors import VerifyError
from moec.ir.parallel_semantics import arrivals
from moec.ir.parser import parse_graph
from moec.ir.verifier import verify

JOIN = """graph @j(%a: f32[{a}, 3], %b: f32[{b}]) -> f32[4, 3] {{
  %y = moe.join_experts [%a, %b] {{order = ({order})}} : f32[4, 3]
  return %y
}}"""
ARRIVALS = """graph @a(%c: i64[8]) -> (i64[2], i64[R, 1]) {{
  %n, %ids = moe.arrivals %c {{ranks = 2, {attrs}}} : i64[2], i64[R, 1]
  return %n, %ids
}}"""
BACKWARD = """graph @b(%g: f32[T, 4], %x: f32[T, 4], %i: i64[T, 1], %w: f32[T, 1], %u: f32[3, 6, 4], %d: f32[3, 4, 6])
    -> f32[2, 6, 4] {{
  %du = moe.experts_backward %g, %x, %i, %w, [%u], [%d] {{experts = 3, layout = "single",
      needs = (false, false, false, true, false), only = ({only})}} {{
    @activation(%h: f32[R, 6]) -> f32[R, 6] {{
      %s = torch.call @aten.relu.default(%h) : f32[R, 6]
      return %s
    }}
  }} : f32[2, 6, 4]
  return %du
}}"""


def join(order: str, a: int = 3, b: str = "1, 3") -> str:
    return JOIN.format(a=a, b=b, order=order)


def test_parts_are_put_where_their_experts_belong() -> None:
    graph = parse_graph(join("2, 0, 3, 1"))
    verify(graph)
    a, b = torch.randn(3, 3), torch.randn(1, 3)
    (got,) = run_graph(graph, [a, b])
    assert got.equal(torch.stack([a[1], b[0], a[0], a[2]]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (join("2, 0, 3, 3"), "every expert once"),
        (join("0, 1, 2, 3", a=2), "do not hold the 4 experts"),
        (join("0, 1, 2, 3", b="1, 5"), "parts differ"),
        (join("0, 1, 2, 3", b=""), "known number"),
        (ARRIVALS.format(attrs="among = (1, 1)"), "different experts"),
        (ARRIVALS.format(attrs="only = (0, 2), among = (1,)"), "instead of only"),
        (BACKWARD.format(only="1, 3"), "different ones of the 3 experts"),
        (BACKWARD.format(only="1, 1"), "different ones of the 3 experts"),
    ],
)
def test_what_says_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(VerifyError, match=says):
        verify(parse_graph(text))


def test_rows_for_some_experts_come_in_their_order_with_their_own_numbers() -> None:
    counts = torch.tensor([1, 0, 2, 1, 3, 1, 0, 2])  # of two ranks, for four experts
    by_rank, ids = arrivals(counts, 2, among=(0, 3))
    assert by_rank.tolist() == [2, 5] and ids.flatten().tolist() == [0, 3, 0, 0, 0, 3, 3]
    by_rank, ids = arrivals(counts, 2, among=())
    assert by_rank.tolist() == [0, 0] and ids.shape == (0, 1)
    graph = parse_graph(ARRIVALS.format(attrs="among = (2, 0)"))
    verify(graph)
    assert [t.flatten().tolist() for t in run_graph(graph, [counts])] == [[3, 3], [2, 2, 0, 0, 0, 0]]


def test_gradients_of_some_experts_are_their_part_of_all() -> None:
    some, every = parse_graph(BACKWARD.format(only="2, 0")), BACKWARD.format(only="2, 0").replace(", only = (2, 0)", "")
    whole = parse_graph(every.replace("f32[2, 6, 4]", "f32[3, 6, 4]"))
    verify(some)
    verify(whole)
    inputs = [torch.randn(5, 4), torch.randn(5, 4), torch.tensor([[0], [2], [0], [2], [2]]), torch.rand(5, 1)]
    inputs += [torch.randn(3, 6, 4), torch.randn(3, 4, 6)]
    (got,), (want,) = run_graph(some, inputs), run_graph(whole, inputs)
    assert got.equal(want[[2, 0]]) and want[[2, 0]].any()
