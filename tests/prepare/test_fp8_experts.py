"""Experts in fp8 as transformers holds them: rewritten, right alone, compiled; or left as they are with the reason."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.report import Report
from tests.backends.cases import relative_error
from tests.backends.fp8 import fp8_row_value, fp8_weight_value

pytest.importorskip("transformers")
from transformers.integrations import finegrained_fp8

from tests.support.fp8_models import SIZES, deepseek

TOKENS = torch.arange(11)[None] * 5 % 64
ROUNDING = 8e-3
"""One unit in the last place of bf16."""


def experts(model: nn.Module) -> Any:
    (found,) = (m for m in model.modules() if type(m).__name__ == "FP8Experts")
    return found


def loop(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What ``FP8Experts`` computes, token by token; its own forward needs kernels that are downloaded."""
    up = fp8_weight_value(module.gate_up_proj.detach(), module.gate_up_proj_scale_inv.float())
    down = fp8_weight_value(module.down_proj.detach(), module.down_proj_scale_inv.float())
    out = torch.zeros(x.shape)
    for t, chosen in enumerate(ids.tolist()):
        for j, e in enumerate(chosen):
            gate, value = (up[e] @ fp8_row_value(x[t])).to(x.dtype).chunk(2)
            row = (down[e] @ fp8_row_value(nn.functional.silu(gate) * value)).to(x.dtype)
            out[t] += row * weights[t, j].to(row.dtype)
    return out.to(x.dtype)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_they_run_without_downloaded_kernels(scale_fmt: str) -> None:
    module = experts(deepseek(scale_fmt))
    x = torch.randn(9, SIZES["hidden_size"]).bfloat16()
    ids, weights = torch.rand(9, 8).argsort(1)[:, :4], torch.rand(9, 4)
    report = moec.prepare(module)
    with torch.no_grad():
        got = module(x, ids, weights)
    assert [site.how for site in report.rewritten] == ["grouped GEMMs in fp8 on its stacked weights"]
    assert relative_error(got, loop(module, x, ids, weights)) <= ROUNDING


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_a_model_is_compiled(scale_fmt: str) -> None:
    model = deepseek(scale_fmt)
    reports: list[Report] = []
    compiled = moec.compile(model, inner="eager", report=reports.append)
    with torch.no_grad():
        want = model(TOKENS).logits
        got = compiled(TOKENS).logits
        scales = experts(model).down_proj_scale_inv
        scales.copy_(scales.float() * 2)
        other = compiled(TOKENS).logits
    assert relative_error(got, want) <= ROUNDING
    assert not relative_error(other, want) <= ROUNDING, "scales are read in every call, and what experts say counts"
    blocks = [block for report in reports for block in report.layers]
    assert [(b.fused, b.backend) for b in blocks] == [(True, "aten")]


def test_training_goes_through_frozen_experts() -> None:
    """As with adapters: what lies below the experts learns, the weights in fp8 do not."""
    model = deepseek()
    moec.prepare(model)
    compiled = torch.compile(model, backend="moec", options={"inner": "aot_eager"})

    def gradient(run: Any) -> Tensor:
        model.zero_grad()
        run(input_ids=TOKENS, labels=TOKENS).loss.backward()
        assert experts(model).gate_up_proj.grad is None
        found = model.model.layers[0].mlp.down_proj.weight.grad
        assert found is not None
        return found.clone()

    assert relative_error(gradient(compiled), gradient(model)) <= 2e-2


def _static(module: Any) -> None:
    module.activation_scheme = "static"


def _one_scale(module: Any) -> None:
    module.block_size = None


def _small_blocks(module: Any) -> None:
    module.block_size = (64, 64)


def _fp4(module: Any) -> None:
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.view(torch.int8), requires_grad=False)


def _another_fp8(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.float().to(torch.float8_e5m2))


def _scales_of_rows(module: Any) -> None:
    module.down_proj_scale_inv = nn.Parameter(torch.ones(8, SIZES["hidden_size"], 1))


def _spread(module: Any) -> None:
    module._is_expert_parallel = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_static, "activation_scheme='static'"),
        (_one_scale, "a scale for a block of None, kernels take blocks of 128 x 128"),
        (_small_blocks, r"a scale for a block of \(64, 64\)"),
        (_fp4, "weights are int8, kernels take float8_e4m3fn"),
        (_another_fp8, "weights are float8_e5m2"),
        (_scales_of_rows, r"scales \[8, 160, 1\] do not fit a weight \[8, 160, 128\]"),
        (_spread, "has spread its experts over ranks"),
    ],
)
def test_other_forms_are_left_alone(change: Any, reason: str) -> None:
    module = experts(deepseek())
    change(module)
    report = moec.prepare(module)
    assert not report.rewritten
    (left,) = report.ignored
    assert re.search(reason, left.reason)


def test_gate_and_up_that_share_a_block_are_left_alone() -> None:
    """transformers puts scales of gate below those of up, whatever the rows of either."""
    model = deepseek(moe_intermediate_size=64)
    module = experts(model)
    module.gate_up_proj_scale_inv = nn.Parameter(torch.ones(8, 2, 2), requires_grad=False)
    (left,) = moec.prepare(module).ignored
    assert "do not fit" in left.reason


def test_a_patched_forward_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts(deepseek())
    monkeypatch.setattr(finegrained_fp8.FP8Experts, "forward", lambda self, x, ids, weights: x)
    (left,) = moec.prepare(module).ignored
    assert "FP8Experts.forward is not written as moec knows it" in left.reason
