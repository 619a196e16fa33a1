"""The eight families through bare ``torch.compile``: one graph, every block fused, no expert GEMM left outside."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import transformers

import moec
from moec.runtime import counters
from tests.compile.watch import Watch, moec_compile
from tests.support.models import FAMILIES, SHARED_EXPERTS, build, inputs
from tests.support.routing import compare_logits, near_tie_tokens

SAME_CALLS_AROUND = 1e-6  # inner="eager" in fp32: only the sums inside the experts may be taken in another order


@lru_cache(maxsize=1)
def model_of(family: str, dtype: torch.dtype, implementation: str | None, layers: int) -> transformers.PreTrainedModel:
    return build(family, dtype=dtype, implementation=implementation, layers=layers)


def block_names(model: torch.nn.Module) -> list[str]:
    return [name.removesuffix(".experts") for name, _ in model.named_modules() if name.endswith(".experts")]


@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        pytest.param(torch.float32, None, id="fp32"),
        pytest.param(torch.bfloat16, None, id="bf16"),
        pytest.param(torch.float32, "batched_mm", id="fp32-batched_mm"),
        pytest.param(torch.bfloat16, "batched_mm", id="bf16-batched_mm", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_graph_every_block_fused(family: str, dtype: torch.dtype, implementation: str | None) -> None:
    both_kinds = family == "qwen3_next" or (dtype, implementation) == (torch.float32, None)
    model = model_of(family, dtype, implementation, layers=2 if both_kinds else 1)
    batch = inputs(family, 2, 12)
    blocks = block_names(model)
    seen = Watch(model)
    with moec.recording() as report:
        got = moec_compile(model, watch=seen)(**batch).logits

    assert report.graphs == 1
    assert [b.name for b in report.layers] == blocks
    assert all(b.recognised and b.fused and b.reason is None and b.backend == "aten" for b in report.layers), report
    assert all((b.num_experts, b.top_k, b.hidden, b.intermediate) == (8, 2, 64, 48) for b in report.layers)
    assert not seen.expert_reads
    shared = [f"{b}.{SHARED_EXPERTS[family]}" for b in blocks if family in SHARED_EXPERTS]
    assert [s.name for b in report.layers for s in b.shared if s.fused and s.num_experts == 1] == shared, report
    assert seen.ops["moec::route"] == len(blocks)
    assert seen.ops["moec::experts"] == len(blocks) + len(shared)
    assert counters.snapshot().by_label == {
        **{b: {"moec::experts": 1, "moec::route": 1} for b in blocks},
        **{s: {"moec::experts": 1} for s in shared},
    }

    with Watch(model) as eager:
        want = model(**batch).logits
    assert eager.expert_reads, "the watch is blind: eager PyTorch reads experts and it sees nothing"
    tolerance = SAME_CALLS_AROUND if dtype == torch.float32 else None
    compare_logits(got, want, ties=near_tie_tokens(model, **batch), tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("qwen3_moe", torch.float32), ("deepseek_v3", torch.bfloat16)])
@torch.no_grad()
def test_inductor_compiles_what_is_around(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype, None, layers=1)
    batch = inputs(family, 2, 12)
    seen = Watch(model)
    with moec.recording() as report:
        got = moec_compile(model, inner="inductor", watch=seen)(**batch).logits
    assert report.graphs == len(report.layers) == 1
    assert report.all_fused
    assert not seen.expert_reads
    assert seen.ops["moec::route"] == 1
    assert seen.ops["moec::experts"] == 1 + (family in SHARED_EXPERTS)
    compare_logits(got, model(**batch).logits, ties=near_tie_tokens(model, **batch))
