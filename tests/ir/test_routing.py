"""``moe.route``: groups of equal load as a fact of the IR, and what the verifier makes of the attributes."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from moec.backends.reference import run_graph
from moec.ir.core import Graph, Op
from moec.ir.errors import VerifyError
from moec.ir.routing import EqualLoad, equal_load_groups
from moec.ir.types import TensorType
from moec.ir.verifier import verify
from tests.backends.cases import ExpertsCase, close, route_graph

MOGE: dict[str, Any] = {"k": 8, "groups": 4, "per_group": 2, "by_group": True}


def test_equal_load_whatever_the_logits() -> None:
    for attrs in (MOGE, MOGE | {"by_group": False}):
        graph = route_graph(16, **attrs)
        verify(graph)
        fact = equal_load_groups(graph.ops[0])
        assert fact == EqualLoad(groups=4, experts=4, slots=2, by_slot=attrs["by_group"])
        assert fact.rows(sympy.Symbol("T")) == 2 * sympy.Symbol("T")
        for logits in (torch.randn(33, 16) * 5, torch.zeros(33, 16), torch.full((33, 16), -torch.inf)):
            _, ids = run_graph(graph, [logits])
            groups = torch.div(ids, fact.experts, rounding_mode="floor")
            assert torch.bincount(groups.flatten(), minlength=4).tolist() == [66] * 4
            assert all(len(set(row)) == 8 for row in ids.tolist())
            if fact.by_slot:
                assert torch.equal(groups, (torch.arange(8) // fact.slots).expand(33, 8))


def test_the_definition_against_a_loop() -> None:
    logits = torch.randn(9, 16)
    want = []
    for row in logits.softmax(-1).tolist():
        best = [sorted(range(4 * g, 4 * g + 4), key=lambda e: -row[e])[:2] for g in range(4)]
        want.append([e for group in best for e in group])
    assert run_graph(route_graph(16, **MOGE), [logits])[1].tolist() == want
    by_score = [sorted(ids, key=lambda e: -logits[t, e].item()) for t, ids in enumerate(want)]
    assert run_graph(route_graph(16, **MOGE | {"by_group": False}), [logits])[1].tolist() == by_score


def test_ties_go_to_the_first() -> None:
    logits = torch.tensor([[0.0, 1, 1, 1], [torch.nan, 0, 3, torch.nan], [2, 2, 2, 2]])
    _, ids = run_graph(route_graph(4, k=2, ties="first", scoring="identity"), [logits])
    assert ids.tolist() == [[1, 2], [0, 3], [0, 1]]
    _, ids = run_graph(route_graph(4, k=1, ties="first", scoring="identity"), [logits])
    assert ids.tolist() == [[1], [0], [0]]


def test_the_fact_is_found_from_the_ids() -> None:
    route, experts = route_graph(8, **(MOGE | {"k": 4, "per_group": 1})), ExpertsCase(experts=8, top_k=4).graph()
    g = Graph("layer")
    logits = g.add_arg(TensorType.of("f32", "T", 8))
    router = g.append(Op("moe.route", [logits], [r.type for r in route.ops[0].results], attrs=route.ops[0].attrs))
    args = [g.add_arg(a.type) for a in experts.args]
    layer = experts.ops[0]
    op = Op(
        "moe.experts", [args[0], router.results[1], router.results[0], *args[3:]], [layer.result.type],
        attrs=layer.attrs, regions=[r.clone() for r in layer.regions], groups=layer.groups,
    )  # fmt: skip
    close(g, g.append(op).result)
    verify(g)
    assert equal_load_groups(op) == EqualLoad(4, 2, 1, True)
    assert equal_load_groups(experts.ops[0]) is None, "ids of an argument say nothing"
    op.set_operand(1, args[1])
    assert equal_load_groups(op) is None


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"k": 6}, "k = 6 is not groups * per_group = 4 * 2"),
        ({"groups": 0}, "needs groups"),
        ({"top_groups": 2}, "no top_groups"),
        ({"groups": 3, "k": 6}, "16 experts do not make 3 groups"),
        ({"groups": 8, "per_group": 3, "k": 24}, "k = 24 does not fit 16 experts"),
        ({"groups": 2, "per_group": -1, "k": 8}, "is not groups * per_group"),
        ({"order": "topk_first"}, "scores first"),
        ({"by_group": False, "scoring": "identity"}, "scores above -inf"),
        ({"by_group": False, "group_fill": 0.0}, "scores above -inf"),
        ({"per_group": 0, "groups": 0}, "there is no per_group"),
        ({"ties": "first", "sorted": False}, "they are sorted"),
        ({"ties": "last"}, "ties"),
        ({"masked_weights": True}, "there are top_groups"),
    ],
)
def test_what_does_not_hold_is_refused(attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=message.replace("*", r"\*")):
        verify(route_graph(16, **(MOGE | attrs)))
