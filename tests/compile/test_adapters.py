"""Low-rank adapters (peft) on attention, router and experts: fused and right, or one reason and PyTorch's path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moec
from tests.compile.test_bad_input import listen
from tests.compile.watch import moec_compile
from tests.support.models import build, inputs

peft = pytest.importorskip("peft")

LOGITS = 1e-5  # fp32 models of random weights; logits are of the order of 1
GRADIENTS = 2e-5  # relative to max(1, largest element)
LAYERS = 1
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "o_proj"]},
    "router": {"target_modules": [], "target_parameters": ["gate.weight"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one weight": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
}
WRAPPED = {"attention": 0, "router": 1, "experts": 2, "one weight": 1}  # wrappers of parameters in a layer
BATCH = inputs("mixtral", 2, 9)


def adapted(targets: str, family: str = "mixtral", layers: int = LAYERS, **config: Any) -> Any:
    """A model with a random adapter, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **TARGETS[targets], **config}
        return peft.get_peft_model(build(family, train=True, layers=layers), peft.LoraConfig(**config))


@torch.no_grad()
def same_logits(model: nn.Module, run: Any) -> torch.Tensor:
    want, got = model(**BATCH).logits, run(**BATCH).logits
    assert (got - want).abs().max() <= LOGITS
    return got


def step(model: nn.Module, run: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(model: nn.Module, run: Any) -> dict[str, torch.Tensor]:
    want, got = step(model, model), step(model, run)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        error = (got[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1)
        assert error <= GRADIENTS, f"gradient of {name} is off by {error:.2e}"
    return got


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_train_in_one_graph(targets: str) -> None:
    layers = 2 if targets == "experts" else 1
    model = adapted(targets, layers=layers)
    prepared = moec.prepare(model)
    assert len(prepared.rewritten) == layers * WRAPPED[targets]
    assert prepared.found == prepared.will_use == layers
    assert ("beside them are rewritten" in str(prepared)) == (WRAPPED[targets] > 0)
    with moec.recording() as report:
        found = same_gradients(model, moec_compile(model))
    assert report.graphs == 1
    assert [b.name for b in report.layers] == [f"base_model.model.model.layers.{i}.mlp" for i in range(layers)]
    assert report.all_fused, report
    assert found and all("lora_" in name for name in found), "base weights are frozen"
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize("targets", ["router", "experts"])
def test_what_adapters_on_parameters_cost_is_told_once(targets: str) -> None:
    model = adapted(targets).eval()
    base = build("mixtral", layers=LAYERS)
    moec.prepare(model)
    compiled = moec_compile(model)
    with moec.recording() as report:
        got, told = listen(lambda: same_logits(model, compiled))
    with torch.no_grad():
        assert (got - base(**BATCH).logits).abs().max() > 100 * LOGITS, "the adapter changes nothing: the test is blind"
    assert report.all_fused
    assert len(told) == (targets == "experts")
    assert report.remarks == told
    for message in told:
        assert "computed in every call" in message
        assert "lora_a.default.weight" in message
        assert "merge_and_unload" in message


def test_a_merged_adapter_leaves_plain_weights() -> None:
    model = adapted("experts").eval()
    with torch.no_grad():
        want = model(**BATCH).logits
    merged = model.merge_and_unload()
    with moec.recording() as report:
        got = same_logits(merged, moec_compile(merged))
    assert (got - want).abs().max() <= LOGITS
    assert report.all_fused
    assert not report.remarks


def moe_block(model: Any) -> nn.Module:
    """The one MoE block, alone: quick to compile."""
    return model.base_model.model.model.layers[0].mlp


def test_merging_in_place_disabling_and_switching_are_seen() -> None:
    """The state of adapters is Python's; a change of it compiles anew and is right."""
    model = adapted("experts").eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **TARGETS["experts"]))
    moec.prepare(model)
    mlp, x = moe_block(model), torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    compiled = moec_compile(mlp, checks="off")

    @torch.no_grad()
    def same() -> torch.Tensor:
        got = compiled(x)
        assert (got - mlp(x)).abs().max() <= LOGITS
        return got

    with moec.recording() as report:
        first = same()
        model.set_adapter("other")
        second = same()
        model.set_adapter("default")
        assert torch.equal(same(), first)
        with model.disable_adapter():
            bare = same()
        model.merge_adapter()
        assert (same() - first).abs().max() <= LOGITS
        model.unmerge_adapter()
        assert (same() - first).abs().max() <= LOGITS
        model.base_model.set_adapter(["default", "other"])
        both = same()
    assert report.all_fused
    results = [first, second, bare, both]
    assert all((a - b).abs().max() > 100 * LOGITS for i, a in enumerate(results) for b in results[:i])


def test_optimizer_steps_on_adapters_are_seen() -> None:
    ours, theirs = adapted("experts"), adapted("experts")
    moec.prepare(ours)
    compiled = moec_compile(ours)
    for model, run in ((ours, compiled), (theirs, theirs)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(2):
            step(model, run)
            optimizer.step()
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (got - want).abs().max() <= LOGITS, name


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_other_layouts(family: str) -> None:
    """Transposed weights with biases; a router with a correction bias and groups."""
    model = adapted("experts", family).eval()
    with torch.no_grad():
        want = model(**BATCH).logits
        moec.prepare(model)
        with moec.recording() as report:
            got = moec_compile(model, checks="off")(**BATCH).logits
    assert (got - want).abs().max() <= LOGITS
    assert report.all_fused


def test_autocast() -> None:
    model = adapted("experts").eval()
    moec.prepare(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = model(**BATCH).logits
        got = moec_compile(model, checks="off")(**BATCH).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("targets", ["attention", "experts"])
def test_layers_with_adapters_share_a_region_while_they_are_alike(targets: str) -> None:
    layers = 3
    model = adapted(targets, layers=layers).eval()
    report = moec.prepare(model, regions=True)
    assert [len(group.layers) for group in report.regions] == [layers], report
    compiled = moec_compile(model, checks="off")
    with moec.recording() as first:
        same_logits(model, compiled)
    assert [b.instances for b in first.layers] == [layers]
    for module in model.base_model.model.model.layers[1].modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    with moec.recording() as second:
        same_logits(model, compiled)
    assert second.all_fused


def test_adapters_of_an_unknown_release_are_in_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = peft.tuners.lora.layer.ParamWrapper
    known = wrapper.forward
    monkeypatch.setattr(wrapper, "forward", lambda self, *args, **kwargs: known(self, *args, **kwargs))
    report = moec.prepare(adapted("one weight", layers=2), regions=True)
    assert not report.rewritten
    assert not report.regions
    assert len(report.left_out) == 2
    assert all("ParamWrapper.forward is not written as moec knows it" in left.reason for left in report.left_out)


def test_explain_knows_a_rewritten_adapter_on_a_router_for_no_block() -> None:
    model = adapted("router").eval()
    moec.prepare(model)
    report = moec.explain(moe_block(model), (torch.randn(1, 5, 64),), backends=["aten"])
    assert [b.fused for b in report.layers] == [True], report


def test_undo_and_eager_leave_the_wrappers_alone() -> None:
    model = adapted("experts").eval()
    with torch.no_grad():
        want = model(**BATCH).logits
        report = moec.prepare(model)
        assert torch.equal(model(**BATCH).logits, want)
        report.undo()
        assert torch.equal(model(**BATCH).logits, want)
    assert all("forward" not in vars(module) for module in model.modules())


def test_unprepared_adapters_on_parameters_are_right_and_explained() -> None:
    """Bare torch.compile: PyTorch breaks the graph at every wrapper."""
    mlp, x = moe_block(adapted("one weight").eval()), torch.randn(1, 5, 64)
    report = moec.explain(mlp, (x,), backends=["aten"])
    (reason,) = [b.reason for b in report.layers if b.name == "experts"]
    assert "an adapter (peft's ParamWrapper)" in str(reason)
    assert "moec.prepare(model)" in str(reason)
    with torch.no_grad():
        got, told = listen(lambda: moec_compile(mlp, fullgraph=False)(x))
        assert torch.equal(got, mlp(x))
    assert sum("computed in every call" in message for message in told) == 1
