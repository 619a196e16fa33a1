"""Whole models through ``torch.compile`` with the triton backend, its kernels interpreted on the CPU, against eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moec
from moec.dynamo import moec_backend
from moec.report import Report
from moec.runtime import ops
from tests.backends.cases import relative_error

pytest.importorskip("transformers")
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.compile.test_zero_experts import Identity
from tests.support.fp8_models import deepseek

pytestmark = pytest.mark.usefixtures("interpreter")
TOLERANCE = 2e-5
"""Of f32 logits after two layers."""
TOLERANCE_FP8 = 3e-2
"""Of bf16 logits, behind rows that may differ by a bit and be another number in fp8."""
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "use_cache": False}


def _mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=40, num_key_value_heads=1, num_local_experts=4))


def _gpt_oss() -> Any:
    return GptOssForCausalLM(
        GptOssConfig(
            **SIZES, intermediate_size=40, num_key_value_heads=1, head_dim=16, num_local_experts=4,
            num_experts_per_tok=2,
        )
    )  # fmt: skip


def _deepseek() -> Any:
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES, intermediate_size=48, moe_intermediate_size=24, first_k_dense_replace=1, num_key_value_heads=2,
            n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=4, q_lora_rank=16, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        )
    )  # fmt: skip


class NoValues(TorchDispatchMode):
    """Refuses to read a value of a tensor on the host, inside moec's ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        inside = {torch.ops.moec.experts.default: ops._experts, torch.ops.moec.route.default: ops._route}.get(func)
        if inside is None:
            return func(*args, **(kwargs or {}))
        self.entered.append(func.name())
        with self:
            return inside(*args)


def _compiled(model: Any, reports: list[Report], mode: TorchDispatchMode | None = None) -> Callable[..., Any]:
    """The model through the door; ``mode`` is on around every call of a compiled graph.

    (Around the whole call it would keep Dynamo from using what is compiled.)
    """
    torch._dynamo.reset()
    options = {"backends": ("triton", "aten"), "inner": "eager", "report": reports.append}

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        run = moec_backend(graph, inputs, options=options)

        def guarded(*args: Tensor) -> Any:
            with mode or contextlib.nullcontext():
                return run(*args)

        return guarded

    return torch.compile(model, backend=backend)  # type: ignore[return-value]


@pytest.mark.parametrize("make", [_mixtral, _gpt_oss, _deepseek], ids=["mixtral", "gpt_oss", "deepseek_v3"])
def test_models_equal_eager_and_wait_for_nothing(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, reports = make().eval(), []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so that experts say something beside the residual
                parameter.mul_(4)
    tokens = torch.arange(11)[None] * 5 % 64
    mode = NoValues()
    compiled = _compiled(model, reports, mode)
    with torch.no_grad():
        want = model(tokens).logits
        got = compiled(tokens).logits
    assert relative_error(got, want) <= TOLERANCE
    assert "moec::experts" in mode.entered
    blocks = [block for report in reports for block in report.layers]
    assert [b.backend for b in blocks if b.fused] == ["triton"] * (1 if make is _deepseek else 2)


def test_experts_in_fp8() -> None:
    """Weights as a quantized checkpoint has them reach the fp8 kernels."""
    model, reports, mode = deepseek(), list[Report](), NoValues()
    moec.prepare(model)
    tokens = torch.arange(3)[None] * 5 % 64
    compiled = _compiled(model, reports, mode)
    with torch.no_grad():
        want, got = model(tokens).logits, compiled(tokens).logits
    assert relative_error(got, want) <= TOLERANCE_FP8
    assert "moec::experts" in mode.entered
    assert [b.backend for report in reports for b in report.layers] == ["triton"]


@pytest.mark.parametrize("tokens", [1, 33])
def test_experts_that_compute_nothing(tokens: int) -> None:
    """Their slots are sentinels for the kernels, their terms stay PyTorch's."""
    layer, reports = Identity().eval(), list[Report]()
    x = torch.randn(tokens, layer.gate.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = layer(x), _compiled(layer, reports)(x)
    assert relative_error(got, want) <= TOLERANCE
    (block,) = (b for report in reports for b in report.layers)
    assert (block.fused, block.backend) == (True, "triton")
    assert "sentinels = true" in str(block.ir_after)


def test_a_value_that_is_read_shows() -> None:
    """The guard of the test above can fail: it does with the backend that waits."""
    with pytest.raises(AssertionError, match="a value is read"), NoValues():
        torch.ones(()).item()


def test_training_has_the_gradients_of_eager() -> None:
    torch.manual_seed(0)
    model = _mixtral()
    tokens = torch.arange(11)[None] * 5 % 64

    def gradients(run: Callable[..., Any]) -> list[Tensor]:
        model.zero_grad()
        run(input_ids=tokens, labels=tokens).loss.backward()
        return [p.grad for p in model.parameters()]

    want, got = gradients(model), gradients(_compiled(model, []))
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) <= TOLERANCE * 10
