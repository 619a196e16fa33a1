"""Real models on the cpu backend's generated kernels, through the torch.compile door."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.backends.cpu.build import compiler
from moec.runtime import counters
from tests.support import models

pytestmark = pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler")
FP32_TOLERANCE = 5e-6  # sums in another order, over two layers
OPTIONS = {"inner": "eager"}  # the default claim order: cpu, then aten


@pytest.mark.parametrize("name", sorted(models.FAMILIES))
def test_the_model_runs_on_generated_kernels_and_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    layers = 2 if name == "qwen3_next" else 1  # its two kinds; those of the others are all alike
    model = models.build(name, layers=layers)
    compiled = torch.compile(model, backend="moec", fullgraph=True, options=OPTIONS)
    with torch.no_grad(), moec.recording() as report:
        for length in (12, 33, 1):
            inputs = models.inputs(name, 2, length)
            counters.reset()
            got = compiled(**inputs).logits
            assert counters.snapshot().by_name["moec::experts"] == layers * (1 + (name in models.SHARED_EXPERTS))
            torch.testing.assert_close(got, model(**inputs).logits, rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)
    assert report.layers and all(b.fused and b.backend == "cpu" for b in report.layers)


def test_training_on_generated_kernels_has_eagers_gradients() -> None:
    torch._dynamo.reset()
    model = models.build("mixtral", train=True)
    inputs = models.inputs("mixtral", 2, 9)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="moec", options={**OPTIONS, "inner": "aot_eager"})
    compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)
