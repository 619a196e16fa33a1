"""Blocks on ``moec::grouped_linear``: what is no MoE block is not taken for one, and runs as it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.readiness.rewriters.canonical import Projection, experts, inverse, sort_slots
from tests.compile.blocks import EXPERTS, HIDDEN, INNER, TOP_K, tokens
from tests.compile.watch import moec_compile

Step = Callable[["Listed", Tensor, Tensor, Tensor], Tensor]


class Listed(nn.Module):
    """One matrix per expert, with biases; ``step`` runs the experts."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weights(*shape: int) -> nn.ParameterList:
            return nn.ParameterList(torch.randn(shape, generator=generator) * 0.3 for _ in range(EXPERTS))

        self.router = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator))
        self.up, self.up_bias = weights(INNER, HIDDEN), weights(INNER)
        self.down, self.down_bias = weights(INNER, HIDDEN), weights(HIDDEN)
        self.step = step

    def projections(self) -> tuple[Projection, Projection]:
        up = Projection(list(self.up), list(self.up_bias))
        return up, Projection(list(self.down), list(self.down_bias), inputs_first=True)

    def forward(self, x: Tensor) -> Tensor:
        scores, ids = torch.topk(torch.softmax(x @ self.router.t(), dim=-1), TOP_K, dim=-1)
        return self.step(self, x, ids, scores)


def plain(self: Listed, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    up, down = self.projections()
    return experts(x, ids, weights, EXPERTS, [up], torch.relu, down)


def counts_of_other_ids(self: Listed, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    order, _ = sort_slots(ids.reshape(-1), EXPERTS)
    _, offsets = sort_slots((EXPERTS - 1 - ids).reshape(-1), EXPERTS)
    return by_hand(self, x, weights, order, order, offsets)


def rows_of_another_order(self: Listed, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    order, offsets = sort_slots(ids.reshape(-1), EXPERTS)
    return by_hand(self, x, weights, order, order.flip(0), offsets)


def by_hand(self: Listed, x: Tensor, weights: Tensor, order: Tensor, weighting: Tensor, offsets: Tensor) -> Tensor:
    up, down = self.projections()
    rows = down.apply(torch.relu(up.apply(x[order // TOP_K], offsets)), offsets)
    rows = rows * weights.reshape(-1)[weighting].unsqueeze(-1)
    return rows[inverse(order)].view(-1, TOP_K, HIDDEN).sum(dim=1)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (plain, None),
        (counts_of_other_ids, "the slots are not sorted by expert id"),
        (rows_of_another_order, "not the router weight of the row's slot"),
    ],
)
@pytest.mark.filterwarnings("ignore::moec.MoecWarning")
@torch.no_grad()
def test_read_or_left_as_it_is(step: Step, why: str | None) -> None:
    layer = Listed(step)
    with moec.recording() as report:
        got = moec_compile(layer)(tokens())
    torch.testing.assert_close(got, layer(tokens()))
    (found,) = report.layers
    assert found.fused == (why is None)
    if why is None:
        assert "stacked = false" in found.ir_after and 'down_form = "kn"' in found.ir_after
    else:
        assert why in str(found.reason)


@torch.no_grad()
def test_an_exported_program(tmp_path: Any) -> None:
    layer = Listed(plain).eval()
    program = moec.optimize(torch.export.export(layer, (tokens(),), strict=False), backends=["aten"])
    assert any("moec.experts" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(tokens()), layer(tokens()))
