"""Modules with a Python loop over experts are marked, so that Dynamo traces the loop as one graph; and unmarked."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.readiness import prepare
from moec.readiness.loops import is_marked
from tests.slicing.loop_layers import H, K, Loop


class Hasty(Loop):
    """Skips experts that got no token: the graph breaks where Python asks."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return out


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(H)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


def _run(model: nn.Module, report: moec.Report, *tokens: int) -> None:
    run = torch.compile(model, backend="moec", options={"inner": "eager", "backends": ["aten"], "checks": "off"})
    for n in tokens:
        x = torch.randn(n, H, generator=torch.Generator().manual_seed(n))
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_prepared_loop_is_one_graph_with_no_more_recompiles_than_eager() -> None:
    model = Net(Loop(), Loop())
    marks = prepare(model)
    assert marks.loops == ["layers.0", "layers.1"]
    torch._dynamo.reset()
    with moec.recording() as report:
        _run(model, report, 6, 3, 1, 0, 9, 4)
    assert report.graphs == 4  # six tokens, any number, one, none: as torch.compile(backend="eager") has it
    assert len(report.layers) == 8 and all(b.fused for b in report.layers)
    assert [b.name for b in report.layers[:2]] == ["layers.0", "layers.1"]
    assert torch._dynamo.config.capture_dynamic_output_shape_ops is False


def test_unprepared_it_breaks_unless_the_whole_graph_is_asked_for() -> None:
    model = Net(Loop())
    torch._dynamo.reset()
    run = torch.compile(model, backend="moec", options={"inner": "eager"})
    with pytest.warns(moec.MoecWarning, match="no MoE block"):
        run(torch.randn(5, H))
    torch._dynamo.reset()
    with moec.recording() as report:
        torch.compile(model, backend="moec", fullgraph=True, options={"inner": "eager"})(torch.randn(5, H))
    assert [b.fused for b in report.layers] == [True]
    (missed,) = moec.explain(model, (torch.randn(5, H),)).layers
    assert not missed.fused and "moec.prepare(model) lets a loop" in (missed.reason or "")


def test_undo_leaves_no_trace() -> None:
    model = Net(Loop(), Loop())
    before = [dict(vars(m)) for m in model.modules()]
    report = prepare(model)
    assert is_marked(model.layers[0])
    prepare(model).undo()
    report.undo()
    assert [dict(vars(m)) for m in model.modules()] == before


def test_what_asks_for_data_breaks_the_graph_and_is_told() -> None:
    model = Net(Hasty())
    prepare(model)
    (block,) = moec.explain(model, (torch.randn(5, H),)).layers
    assert not block.fused and "asks for data" in (block.reason or "")


def test_copies_carry_the_mark_and_can_be_prepared_again() -> None:
    model = Net(Loop())
    prepare(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert prepare(other).loops == ["layers.0"]
        assert other.layers[0].forward.__self__ is other.layers[0]
        x = torch.randn(K, H)
        assert torch.equal(other(x), model(x))


def test_a_replaced_forward_is_left() -> None:
    model = Net(Loop())
    model.layers[0].forward = lambda x: x  # type: ignore[method-assign]
    assert prepare(model).loops == []
