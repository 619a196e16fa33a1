"""Shared experts of whole models: who runs them, what is told of them, and ways to run a model that concern them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.backends.cpu.build import compiler
from moec.report import BlockReport
from moec.runtime import counters
from tests.compile.blocks import Layers
from tests.compile.watch import Watch, moec_compile
from tests.slicing.alike import same_gradients, same_step
from tests.slicing.custom_layers import H
from tests.slicing.shared_layers import Gated, GatedInBatches, InBatches, NoGate, OneWeight, Plain, Products, WithShared
from tests.support.models import SHARED_EXPERTS, build, inputs
from tests.support.routing import compare_logits, near_tie_tokens

SAME = 2e-6  # fp32 logits: sums inside the GEMMs alone are taken in another order
NEEDS_COMPILER = pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler")


def shared_of(report: moec.Report) -> list[BlockReport]:
    return [s for block in report.layers for s in block.shared]


class Linears(nn.Module):
    """A dense MLP of modules, as models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 12), nn.Linear(12, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


class OfModules(WithShared):
    def __init__(self) -> None:
        super().__init__()
        self.dense = Linears()

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x)


@NEEDS_COMPILER
@pytest.mark.parametrize("case", [Plain, Gated, GatedInBatches, InBatches, OneWeight, NoGate, Products])
def test_the_cpu_kernel_computes_the_step(case: type[WithShared]) -> None:
    eager, compiled = case(), case()
    run = torch.compile(compiled, backend="moec", dynamic=True, options={"inner": "aot_eager"})
    with moec.recording() as report:
        for tokens in (1, 20):
            x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens))
            same_step(run, eager, x, torch.float32, True)
    same_gradients(compiled, eager, torch.float32)
    assert shared_of(report) and all(s.fused and s.backend == "cpu" for s in shared_of(report)), report


@NEEDS_COMPILER
@pytest.mark.parametrize("family", SHARED_EXPERTS)
@torch.no_grad()
def test_nothing_of_it_is_left_to_pytorch(family: str) -> None:
    """The rows of the shared expert's three linear layers are computed in the op, and its weights are read in place."""
    model = build(family, layers=1)
    batch = inputs(family, 2, 12)
    seen = Watch(model)
    got = moec_compile(model, watch=seen, backends=["cpu", "aten"])(**batch).logits
    with Watch(model) as eager:
        want = model(**batch).logits
    compare_logits(got, want, ties=near_tie_tokens(model, **batch), tolerance=SAME)
    expert = model.get_submodule(f"model.layers.0.mlp.{SHARED_EXPERTS[family]}")
    assert {p.data_ptr() for p in expert.parameters()} <= seen.params
    gemms = ("aten::mm", "aten::addmm", "aten::linear")
    assert sum(eager.ops[g] - seen.ops[g] for g in gemms) >= 3


@torch.no_grad()
def test_moec_compile_and_the_table() -> None:
    model = build("qwen3_next", layers=1)
    batch = inputs("qwen3_next", 1, 6)
    report = moec.explain(model, kwargs=batch, backends=("aten",))
    text = str(report)
    assert "model.layers.0.mlp.shared_expert" in text and "every token, weighted" in text and "1 x 48" in text
    (block,) = json.loads(report.to_json())["layers"]
    assert [s["name"] for s in block["shared"]] == ["model.layers.0.mlp.shared_expert"]
    assert report.all_fused
    compiled = moec.compile(model, inner="eager", backends=("aten",))
    compare_logits(compiled(**batch).logits, model(**batch).logits, tolerance=SAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast the weights are cast in every call, by whoever runs the MLP."""
    eager, compiled = OfModules(), OfModules()
    compiled.load_state_dict(eager.state_dict())
    run = moec_compile(compiled)
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(0))
    with moec.recording() as report, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        same_step(run, eager, x, dtype, True)
    (shared,) = shared_of(report)
    assert shared.fused and shared.dtype == ("bf16" if dtype == torch.bfloat16 else "f32"), report


def test_frozen_weights_have_no_gradient_and_the_others_have() -> None:
    eager, compiled = Plain(), Plain()
    for layer in (eager, compiled):
        layer.su.requires_grad_(False)
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(0))
    same_step(moec_compile(compiled, inner="aot_eager"), eager, x, torch.float32, True)
    same_gradients(compiled, eager, torch.float32)
    assert compiled.su.grad is None and compiled.sd.grad is not None and compiled.sd.grad.abs().max() > 0


def test_an_optimizer_step_is_seen() -> None:
    layer = Plain()
    run = moec_compile(layer)
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = run(x)
        layer.sd.mul_(2)
        after = run(x)
        torch.testing.assert_close(after, layer(x))
    assert not torch.allclose(before, after)


def test_it_saves_no_more_than_its_inputs() -> None:
    """Neither gate, up nor the activation is kept for the backward pass."""
    layer, kept = OfModules(), []
    run = moec_compile(layer, inner="aot_eager")
    x = torch.randn(64, H)
    run(x).sum().backward()

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x)
    assert kept and not any(t.shape == (64, 12) for t in kept)


def listed(**options: Any) -> BlockReport:
    with moec.recording() as report, torch.no_grad():
        layer = Plain()
        x = torch.randn(5, H)
        torch.testing.assert_close(moec_compile(layer, **options)(x), layer(x))
    (shared,) = shared_of(report)
    assert report.layers[0].fused
    return shared


def test_a_pipeline_without_the_pass_leaves_it() -> None:
    shared = listed(passes="functionalize,canonicalize,cse,raise-moe,fuse-routing,fuse-experts,dce", checks="strict")
    assert not shared.fused and "leaves no MoE op" in str(shared.reason)


def test_without_fuel_it_stays() -> None:
    layer, x = Plain(), torch.randn(5, H)
    with moec.recording() as report, torch.no_grad():
        torch.testing.assert_close(moec_compile(layer, fuel=0, checks="off")(x), layer(x))
    assert not any(s.fused for s in shared_of(report))


def test_a_backend_that_is_asked_later_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own compiler runs it as well as ``aten`` would, and can join what is around it."""
    from moec.backends.base import Support
    from moec.backends.cpu import CpuBackend

    monkeypatch.setattr(CpuBackend, "supports", lambda self, op, target: Support.no("it is Sunday"))
    shared = listed(backends=["cpu", "aten"])
    assert not shared.fused and "cpu: it is Sunday" in str(shared.reason)


def test_nobody_is_warned_of_a_shared_expert_that_stays(recwarn: pytest.WarningsRecorder) -> None:
    from tests.slicing.shared_layers import Masked

    with torch.no_grad():
        moec_compile(Masked(), checks="strict")(torch.randn(5, H))
    assert not [w for w in recwarn if issubclass(w.category, moec.MoecWarning)]


@pytest.mark.parametrize("where", ["dense", "dense.up", "dense.down"])
@torch.no_grad()
def test_hooks_are_called(where: str) -> None:
    layer, calls = OfModules(), []

    def after(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(where)
        return out * 2

    x = torch.randn(5, H)
    plain = layer(x)
    layer.get_submodule(where).register_forward_hook(after)
    want = layer(x)
    assert not torch.allclose(want, plain), "the hook changes nothing: the test is blind"
    calls.clear()
    run = moec_compile(layer)
    for _ in range(2):
        torch.testing.assert_close(run(x), want)
    assert calls == [where] * 2


@pytest.mark.parametrize("linear", ["up", "down"])
@torch.no_grad()
def test_adapters_stay_with_pytorch_until_they_are_merged(linear: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=[f"dense.{linear}"])
    model, x = peft.get_peft_model(Layers(OfModules()), config), torch.randn(7, H)
    with moec.recording() as report:
        torch.testing.assert_close(moec_compile(model)(x), model(x))
    (shared,) = shared_of(report)
    assert report.all_fused and not shared.fused
    assert "is an adapter" in str(shared.reason) and "merge_and_unload()" in str(shared.reason)
    merged = model.merge_and_unload()
    torch._dynamo.reset()
    with moec.recording() as report:
        torch.testing.assert_close(moec_compile(merged)(x), merged(x))
    assert [s.fused for s in shared_of(report)] == [True]


@torch.no_grad()
def test_dense_layers_of_a_model_stay_dense() -> None:
    """DeepSeek's first layers have an MLP of the same class and no experts beside it."""
    model = build("deepseek_v3", layers=2, first_k_dense_replace=1)
    batch = inputs("deepseek_v3", 1, 6)
    counters.reset()
    with moec.recording() as report:
        moec_compile(model)(**batch)
    assert [s.name for s in shared_of(report)] == ["model.layers.1.mlp.shared_experts"]
    assert sorted(counters.snapshot().by_label) == ["model.layers.1.mlp", "model.layers.1.mlp.shared_experts"]
