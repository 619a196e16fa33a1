"""The export door: exported programs of real models with their blocks as moec's ops, equal to eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import moec
from moec.runtime import counters
from tests.support import models

FP32_TOLERANCE = 5e-6  # re-association inside GEMMs, over two layers
TRAINED_FAMILIES = ("mixtral", "gpt_oss")


class Logits(nn.Module):
    """A causal language model as a function of its tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return out


def export(
    name: str, tokens: Tensor, *, implementation: str = "grouped_mm", dynamic: bool = False, layers: int = 2
) -> Any:
    model = Logits(models.build(name, implementation=implementation, layers=layers))
    shapes = {"tokens": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None
    with torch.no_grad():
        return model, torch.export.export(model, (tokens,), dynamic_shapes=shapes, strict=False)


def check(model: nn.Module, program: ExportedProgram, tokens: Tensor, layers: int = 2, shared: str = "") -> None:
    with moec.recording() as report:
        optimized = moec.optimize(program)
    assert [b.fused for b in report.layers] == [True] * layers, report
    assert [(s.name, s.fused) for b in report.layers for s in b.shared] == [
        (f"{b.name}.{shared}", True) for b in report.layers if shared
    ]
    with torch.no_grad():
        expected = model(tokens)
        counters.reset()
        got = optimized.module()(tokens)
    assert counters.snapshot().by_name["moec::experts"] == layers * (2 if shared else 1)
    torch.testing.assert_close(got, expected, rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)


TOKENS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(3, 128, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_is_fused_and_equal(name: str) -> None:
    layers = 2 if name in ("mixtral", "qwen3_next") else 1  # a program of two blocks, and one of two kinds of layers
    model, program = export(name, TOKENS, layers=layers)
    check(model, program, TOKENS, layers, shared=models.SHARED_EXPERTS.get(name, ""))


@pytest.mark.parametrize("decompose", [False, True], ids=["training-ir", "decomposed"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", TRAINED_FAMILIES)
def test_dynamic_shapes_in_both_forms(name: str, implementation: str, decompose: bool) -> None:
    model, program = export(name, TOKENS, implementation=implementation, dynamic=True, layers=1)
    if decompose:
        program = program.run_decompositions()
    check(model, program, OTHER, 1, shared=models.SHARED_EXPERTS.get(name, ""))


def test_a_program_without_moe_comes_back_equal_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(3, 8)
    with moec.recording() as report:
        optimized = moec.optimize(torch.export.export(model, (x,)))
    assert report.layers == [] and "no MoE block" in report.remarks[-1]
    torch.testing.assert_close(optimized.module()(x), model(x), rtol=0, atol=0)


def test_a_half_fused_program_comes_back_unchanged_with_a_reason() -> None:
    _, program = export("mixtral", TOKENS)
    with moec.recording() as report:
        same = moec.optimize(program, passes="functionalize,canonicalize,raise-moe")
    assert same is program
    assert [(b.recognised, b.fused) for b in report.layers] == [(True, False)] * 2
    assert all("unfused" in (b.reason or "") for b in report.layers)


def test_a_bad_option_is_one_clear_error() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(moec.MoecError, match="passes"):
        moec.optimize(program, pases="default")
