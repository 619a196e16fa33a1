"""Ways to run a model that change what Dynamo hands over: right, or PyTorch's own path and a remark."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from moec.runtime import counters
from tests.compile.watch import Watch, moec_compile
from tests.slicing.alike import near
from tests.slicing.custom_layers import H
from tests.slicing.shared_layers import Plain
from tests.support.models import build, inputs
from tests.support.routing import compare_logits, near_tie_tokens

SAME_CALLS_AROUND = 1e-6
GRADIENTS = 2e-5  # of two fp32 backward passes, relative to max(1, max |gradient|)
FAMILY = "mixtral"


@pytest.fixture(scope="module")
def model() -> Any:
    return build(FAMILY, layers=1)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return inputs(FAMILY, 2, 12)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    compare_logits(got, want, tolerance=SAME_CALLS_AROUND)


def ran() -> int:
    return counters.snapshot().by_name.get("moec::experts", 0)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inference_mode(model: Any, batch: dict[str, torch.Tensor], inner: str) -> None:
    with torch.inference_mode():
        want = model(**batch).logits
        got = moec_compile(model, inner=inner)(**batch).logits
    assert got.is_inference()
    assert ran() == 1
    same(got, want)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_router_logits_and_auxiliary_loss(batch: dict[str, torch.Tensor], inner: str) -> None:
    model = build(FAMILY, layers=2, train=True)
    call = {**batch, "labels": batch["input_ids"], "output_router_logits": True}

    def step(run: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        model.zero_grad()
        out = run(**call)
        out.loss.backward()
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want, want_gradients = step(model)
    with moec.recording() as report:
        got, gradients = step(moec_compile(model, inner=inner))
    assert report.all_fused
    assert ran() == 2
    assert got.aux_loss.item() > 0
    torch.testing.assert_close(got.aux_loss, want.aux_loss, rtol=SAME_CALLS_AROUND, atol=0)
    torch.testing.assert_close(got.loss, want.loss, rtol=SAME_CALLS_AROUND, atol=0)
    assert len(got.router_logits) == len(want.router_logits) == 2
    for ours, theirs in zip(got.router_logits, want.router_logits, strict=True):
        same(ours, theirs)
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, want_gradients[name], rtol=0, atol=GRADIENTS, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_autocast_around_a_model_in_fp32(family: str) -> None:
    model = build(family, layers=1)
    batch = inputs(family, 2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**batch).logits
        ties = near_tie_tokens(model, margin=4e-2, **batch)
        with moec.recording() as report:
            got = moec_compile(model)(**batch).logits
    assert want.dtype == torch.bfloat16
    compare_logits(got, want, ties=ties)
    block = report.layers[0]
    assert block.fused or block.reason
    assert ran() == block.fused + sum(s.fused for s in block.shared)


class Inside(torch.nn.Module):
    """A layer that enters autocast itself, around its block, and leaves it again for what follows."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.layer(x)
            with torch.autocast("cpu", enabled=False):
                z = self.layer(x)
        return y, z


@pytest.mark.filterwarnings("ignore::moec.MoecWarning")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_that_the_model_enters(inner: str) -> None:
    """Equal slices in different modes are different programs."""
    layer = Inside(Plain())
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(0))
    with moec.recording() as report, torch.no_grad():
        got = moec_compile(layer, inner=inner)(x)
    assert [b.shared[0].dtype for b in report.layers if b.shared[0].fused] == ["bf16", "f32"], report
    assert report.layers[1].fused, report
    for ours, theirs, dtype in zip(got, layer(x), (torch.bfloat16, torch.float32), strict=True):
        assert ours.dtype == dtype
        near(ours, theirs, dtype)


@torch.no_grad()
def test_leaving_autocast_compiles_anew(model: Any, batch: dict[str, torch.Tensor]) -> None:
    compiled = moec_compile(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(**batch).logits.dtype == torch.bfloat16
    same(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("what", ["mlp", "mlp.experts", "mlp.gate"])
@torch.no_grad()
def test_hooks_on_a_moe_module_are_called(batch: dict[str, torch.Tensor], what: str) -> None:
    """Hooks that are there when the model is compiled: Dynamo does not look for later ones."""
    model = build(FAMILY, layers=1)
    plain = model(**batch).logits
    module = model.get_submodule(f"model.layers.0.{what}")
    calls: list[str] = []

    def before(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append("before")
        return (args[0] * 0.5, *args[1:])

    def after(_module: Any, _args: Any, out: Any) -> Any:
        calls.append("after")
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
    want = model(**batch).logits
    assert not torch.allclose(want, plain), "the hooks change nothing: the test is blind"
    calls.clear()
    seen = Watch(model)
    compiled = moec_compile(model, watch=seen)
    with moec.recording() as report:
        got = compiled(**batch).logits
        same(got, want)
        same(compiled(**batch).logits, want)
    assert calls == ["before", "after"] * 2
    block = report.layers[0]
    assert block.fused or block.reason
    assert bool(seen.expert_reads) is not block.fused


def test_gradients_on_and_off(model: Any, batch: dict[str, torch.Tensor]) -> None:
    compiled = moec_compile(model, inner="aot_eager")
    want = model(**batch).logits
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            got = compiled(**batch).logits
        assert got.requires_grad is grad
        same(got, want)
    with torch.inference_mode():
        same(compiled(**batch).logits, want)
    assert ran() == 4


@torch.no_grad()
def test_train_and_eval(batch: dict[str, torch.Tensor]) -> None:
    """Mixtral multiplies the tokens by noise in training, inside the block; without it both modes are one."""
    model = build(FAMILY, layers=1)
    compiled = moec_compile(model)
    for training in (True, False, True):
        model.train(training)
        same(compiled(**batch).logits, model(**batch).logits)
    assert ran() == 3


@torch.no_grad()
def test_router_noise_in_training_keeps_its_random_numbers(batch: dict[str, torch.Tensor]) -> None:
    model = build(FAMILY, layers=1, train=True, router_jitter_noise=0.3)
    seen = Watch(model)
    compiled = moec_compile(model, watch=seen)
    torch.manual_seed(7)
    want = model(**batch).logits
    torch.manual_seed(7)
    got = compiled(**batch).logits
    same(got, want)
    assert not torch.allclose(compiled(**batch).logits, want), "no noise: the test is blind"
    assert ran() == 2 or seen.expert_reads
