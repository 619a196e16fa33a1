"""Experts that cannot be chosen leave a model: it computes what it did with fewer weights, or an error says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from moec import MoecError
from tests.support.models import build, inputs

SAME = 1e-5
"""Largest difference of logits."""
EXPERTS, HIDDEN, INNER = 8, 64, 48


def blocks(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(family, 2, 9)).logits


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_minus_infinity_in_a_bias_is_a_dead_expert(family: str) -> None:
    model = build(family)
    for i, block in enumerate(blocks(model)):
        bias = block.router.bias if family == "gpt_oss" else block.gate.e_score_correction_bias
        bias.data[[i, i + 4]] = -torch.inf  # one of each group
    want, before = logits(model, family), sum(p.nbytes for p in model.parameters())
    report = moec.drop_dead_experts(model)
    torch.testing.assert_close(logits(model, family), want, rtol=0, atol=SAME)
    assert [b.dead for b in report.blocks] == [(0, 4), (1, 5)]
    weights = sum(p.nbytes for p in model.parameters())
    assert 0 <= report.freed - (before - weights) <= 2 * 2 * 4  # buffers are counted too
    assert report.freed > 2 * 2 * 3 * HIDDEN * INNER * 4
    assert "2 experts dropped, 6 left" in str(report)
    assert all(b.experts.num_experts == 6 for b in blocks(model))
    assert model.config.num_local_experts == 6
    compiled = torch.compile(model, backend="moec", options={"inner": "eager", "backends": ["aten"]})
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs(family, 2, 9)).logits, want, rtol=0, atol=SAME)


def test_named_experts_are_pruned_as_if_their_logit_were_minus_infinity() -> None:
    model, other = build("mixtral"), build("mixtral")
    name = "model.layers.1.mlp.experts"
    report = moec.drop_dead_experts(model, {name: [7, 2]})
    gate = other.model.layers[1].mlp.gate

    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raw = x.reshape(-1, HIDDEN) @ gate.weight.t()
        raw[:, [2, 7]] = -torch.inf
        w, ids = raw.softmax(-1).topk(2)
        return raw, w / w.sum(-1, keepdim=True), ids

    gate.forward = route
    torch.testing.assert_close(logits(model, "mixtral"), logits(other, "mixtral"), rtol=0, atol=SAME)
    (block,) = report.blocks
    assert (block.name, block.dead, block.left) == (name, (2, 7), 6)
    assert model.config.num_local_experts == EXPERTS and report.notes


def test_an_optimizer_keeps_its_parameters_and_gradients() -> None:
    model = build("gpt_oss", train=True)
    model(**inputs("gpt_oss", 1, 5), labels=inputs("gpt_oss", 1, 5)["input_ids"]).loss.backward()
    for block in blocks(model):
        block.router.bias.data[3] = -torch.inf
    held = {id(p) for p in model.parameters()}
    moec.drop_dead_experts(model)
    assert {id(p) for p in model.parameters()} == held
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert model.training and all(b.training for b in blocks(model))


def test_nothing_is_dead() -> None:
    model = build("glm4_moe")
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    report = moec.drop_dead_experts(model)
    assert not report.blocks and not report.freed and str(report) == "no expert is dead"
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    assert str(moec.drop_dead_experts(torch.nn.Linear(2, 2))) == "no expert is dead"


LAYER = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("family", "dead", "says"),
    [
        ("glm4_moe", {LAYER: [0]}, "2 groups of experts would hold 3, 4"),
        ("glm4_moe", {LAYER: [0, 1, 2, 4, 5, 6]}, "would be left|would hold 1, 1"),
        ("mixtral", {LAYER: list(range(7))}, "1 experts would be left, a token chooses 2"),
        ("mixtral", {LAYER: [8]}, "has no expert 8: it holds 8"),
        ("mixtral", {"model.layers.0.mlp.expert": [0]}, "is no experts module"),
    ],
)
def test_what_cannot_be_dropped(family: str, dead: dict[str, list[int]], says: str) -> None:
    model = build(family)
    want = logits(model, family)
    with pytest.raises(MoecError, match=says):
        moec.drop_dead_experts(model, dead)
    assert logits(model, family).equal(want)


def test_a_softmax_over_all_experts_would_change() -> None:
    """The router counts the dead expert in its softmax; the model is as it was after the refusal."""
    model = build("gpt_oss")
    for block in blocks(model):
        block.router.bias.data[0] = -torch.inf
        bias = torch.zeros(EXPERTS)
        block.router.register_buffer("selection", bias)

        def route(x: torch.Tensor, r: Any = block.router) -> Any:
            raw = x.reshape(-1, HIDDEN) @ r.weight.t()
            scores = raw.softmax(-1)
            ids = (scores + r.selection).topk(2)[1]
            return raw, scores.gather(1, ids), ids

        block.router.forward = route
        block.router.bias.data[0] = 0
    last = blocks(model)[-1].router
    last.selection[0] = -torch.inf
    want = logits(model, "gpt_oss")
    with pytest.raises(MoecError, match="another result"):
        moec.drop_dead_experts(model)
    assert logits(model, "gpt_oss").equal(want)
    assert last.weight.shape[0] == EXPERTS and last.num_experts == EXPERTS
