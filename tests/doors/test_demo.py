"""The demo's parts, and the demo itself on a model that is smaller still."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import moec
from moec.demo import check, flow, timing
from moec.demo.model import SMALL, Shape, build, twin, weight_bytes
from moec.ir.errors import MoecError
from moec.random_weights import fill_random

TINY = Shape("tiny", 64, 48, 8, 2, 4, 2, 16, 512, 80)
F32_TOLERANCE = 1e-5


def test_the_loop_is_the_sum_over_chosen_experts() -> None:
    torch.manual_seed(0)
    experts = SimpleNamespace(gate_up_proj=torch.randn(3, 8, 5), down_proj=torch.randn(3, 5, 4))
    x, weights = torch.randn(4, 5), torch.rand(4, 2)
    ids = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 2]])  # expert 1 is idle, the last token chooses one twice
    expected = torch.zeros(4, 5)
    for t in range(4):
        for k in range(2):
            e = int(ids[t, k])
            h = experts.gate_up_proj[e] @ x[t]
            expected[t] += weights[t, k] * (experts.down_proj[e] @ (torch.nn.functional.silu(h[:4]) * h[4:]))
    got = check.loop_over_experts(experts, x, ids, weights)
    assert float((got - expected).abs().max()) < F32_TOLERANCE * float(expected.abs().max())


def test_near_ties() -> None:
    firm, tied = [3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.999, 0.0]
    far_below = [3.0, 2.0, 1.0, 1.0]  # a tie between experts that are not chosen anyway
    assert check.near_ties([torch.tensor([firm, tied, far_below, firm])], 2).tolist() == [False, True, False, False]
    layers = [torch.tensor([firm, tied]), torch.tensor([tied, firm])]
    assert check.near_ties(layers, 2).tolist() == [True, True]


def test_tokens_near_a_tie_are_counted_apart() -> None:
    expected = torch.eye(4) * 10
    got = expected.clone()
    got[1] = -5
    near = torch.tensor([False, True, False, False])
    assert check.check_model(expected, got, near).ok
    assert check.check_model(expected, got, near).same_choice == 3
    assert not check.check_model(expected, got, ~near).ok


def test_a_twin_shares_the_weights_only() -> None:
    model = build(TINY)
    other = twin(model)
    assert other is not model
    assert other.config is not model.config
    shared = zip(model.parameters(), other.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in shared)
    assert weight_bytes(model) == 2 * sum(p.numel() for p in model.parameters())


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MoecError, match=r"moec\[hf\]"):
        build(SMALL)


def test_random_weights_fill_everything() -> None:
    names: list[str] = []
    model = torch.nn.ModuleDict(
        {"proj": torch.nn.Linear(300, 400), "norm": torch.nn.LayerNorm(30), "head": torch.nn.Linear(300, 400)}
    ).to(torch.bfloat16)
    for p in model.parameters():
        p.data.fill_(float("nan"))
    fill_random(model, progress=lambda name, size: names.append(name))
    assert names == [name for name, _ in model.named_parameters()]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    weight = model["proj"].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(weight, model["head"].weight)
    assert model["proj"].bias.abs().max().item() == 0
    assert torch.equal(model["norm"].weight, torch.ones(30, dtype=torch.bfloat16))


def test_random_weights_go_round_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.random_weights._BLOCK", 7)
    weight = fill_random(torch.nn.Linear(4, 5, bias=False)).weight.flatten()
    assert torch.equal(weight[:13], weight[7:])
    assert len(weight[:7].unique()) == 7


def test_random_weights_into_transposed_storage() -> None:
    model = torch.nn.Linear(4, 5, bias=False)
    plain = fill_random(model).weight.clone()
    model.weight = torch.nn.Parameter(torch.empty(4, 5).t())
    assert torch.equal(fill_random(model).weight, plain)


def test_measuring_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(timing, "_ENOUGH_S", 0.0)
    timing._median(lambda: calls.append(1))
    assert len(calls) == timing._FEWEST_RUNS


@pytest.mark.slow
def test_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(flow, "SMALL", TINY)
    monkeypatch.setattr(timing, "_ENOUGH_S", 0.0)
    # Inductor's own compile is tested elsewhere and takes most of the time.
    monkeypatch.setattr(flow, "_inductor", lambda model: torch.compile(model, backend="eager"))
    monkeypatch.setattr(flow, "_moec", lambda model: moec.compile(model, inner="eager"))
    flow.run(small=True)
    shown = capsys.readouterr()
    for part in (
        "softmax top-2 renorm",
        "moe.dispatch",
        "moe.experts",
        "near a routing tie",
        "inductor",
        "moec against",
    ):
        assert part in shown.out
    assert "NOT ok" not in shown.out
    assert "compile and time moec" in shown.err
