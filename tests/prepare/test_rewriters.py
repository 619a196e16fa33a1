"""Rewritten blocks compute what their own forward computes, and what is captured of them is one fused block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.readiness import prepare
from tests.compile.watch import moec_compile
from tests.prepare.undecorated import EXPERTS, FAMILIES, FAVOURITE, HIDDEN, INNER, block, first, tokens

SAME_F32 = {"rtol": 1e-5, "atol": 1e-5}  # the same products, added in another order
SAME_BF16 = {"rtol": 2e-2, "atol": 2e-2}  # a few roundings of 2**-8 at other places
PREFILL, DECODE, LONGER = (2, 7), (1, 1), (3, 11)


def both(family: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A block as it is, and a copy of it that is prepared."""
    own = block(family, **options)
    rewritten = copy.deepcopy(own)
    report = prepare(rewritten)
    assert [site.name for site in report.rewritten] == [FAMILIES[family].fused], str(report)
    assert not report.ignored
    return own, rewritten


@pytest.mark.parametrize("skewed", [False, True], ids=["", "skewed"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_same_in_plain_eager(family: str, skewed: bool) -> None:
    own, rewritten = both(family, skewed=skewed)
    for shape in (PREFILL, DECODE, LONGER):
        x = tokens(*shape)
        torch.testing.assert_close(first(rewritten(x.clone())), first(own(x.clone())), **SAME_F32)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_tokens_at_all(family: str) -> None:
    _, rewritten = both(family)
    assert first(rewritten(tokens(1, 0))).shape == (0, HIDDEN)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_same_in_bf16(family: str) -> None:
    """Router and all run the very calls of the model's own router, so both route alike."""
    own = block(family).to(torch.bfloat16)
    rewritten = copy.deepcopy(own)
    assert prepare(rewritten).rewritten
    x = tokens().to(torch.bfloat16)
    got, want = first(rewritten(x.clone())), first(own(x.clone()))
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, **SAME_BF16)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_graph_and_one_fused_block(family: str) -> None:
    own, rewritten = both(family)
    compiled = moec_compile(rewritten)
    with moec.recording() as report:
        # a second length makes the graph one for all lengths; the families do not differ in that
        for shape in (
            (PREFILL, DECODE, LONGER) if family in ("longcat_flash", "switch_transformers") else (PREFILL, DECODE)
        ):
            x = tokens(*shape)
            torch.testing.assert_close(first(compiled(x.clone())), first(own(x.clone())), **SAME_F32)
    assert report.layers and all(b.recognised and b.fused and b.backend == "aten" for b in report.layers), report
    listed = family in ("switch_transformers", "nllb_moe")
    assert all(("stacked = false" in b.ir_after) == listed for b in report.layers)
    count = 2 if family == "nllb_moe" else EXPERTS
    assert {(b.num_experts, b.hidden, b.intermediate) for b in report.layers} == {(count, HIDDEN, INNER)}
    assert {b.projections for b in report.layers} == {1 if listed else 2}


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_gradients(family: str, way: str) -> None:
    own, rewritten = both(family)
    run = rewritten if way == "eager" else moec_compile(rewritten)
    found = []
    with moec.recording() as report:
        run(tokens())
    assert way == "eager" or report.all_fused, report
    for call, module in ((own, own), (run, rewritten)):
        x = tokens().requires_grad_()
        y = first(call(x * 1.0))  # not a leaf: some routers scale their input in place
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
        found.append({"x": x.grad, **grads})
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, **SAME_F32, msg=lambda m, name=name: f"{name}: {m}")
    assert sum(float(g.abs().sum()) > 0 for g in found[0].values()) > 2


@pytest.mark.parametrize("family", ["llama4", "switch_transformers", "nllb_moe"])
@torch.no_grad()
def test_an_exported_program(family: str) -> None:
    own, rewritten = both(family)
    lengths = ({1: torch.export.Dim.AUTO},)
    program = torch.export.export(rewritten, (tokens(),), dynamic_shapes=lengths, strict=False)
    optimized = moec.optimize(program, backends=["aten"])
    ops = sum(node.target is torch.ops.moec.experts.default for node in optimized.graph.nodes)
    assert ops == (2 if family == "llama4" else 1)  # its shared expert
    torch.testing.assert_close(first(optimized.module()(tokens(2, 9))), first(own(tokens(2, 9))), **SAME_F32)


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
@torch.no_grad()
def test_a_router_in_f32_within_bf16_is_cast_as_its_own_forward_does(family: str) -> None:
    own, rewritten = both(family)
    for module in (own, rewritten):
        module.to(torch.bfloat16)
        module(tokens().to(torch.bfloat16))
        assert module.router.classifier.weight.dtype == torch.float32


@torch.no_grad()
def test_all_tokens_to_one_expert_is_what_skewed_means() -> None:
    module = block("jetmoe", skewed=True)
    ids = module.router.layer(tokens().view(-1, HIDDEN)).argmax(dim=-1)
    assert (ids == FAVOURITE).all()


@torch.no_grad()
def test_switch_drops_tokens_beyond_the_capacity() -> None:
    _, rewritten = both("switch_transformers", skewed=True)
    y = rewritten(tokens(2, 7))
    assert (y[:, :2] != 0).any(dim=-1).all()
    assert (y[:, 2:] == 0).all()  # the capacity is 2 per sequence


@pytest.mark.parametrize("family", ["longcat_flash", "llama4"])
@torch.no_grad()
def test_autocast(family: str) -> None:
    own, rewritten = both(family)
    x = tokens()
    compiled = moec_compile(rewritten)
    with torch.autocast("cpu", torch.bfloat16), moec.recording() as report:
        want = first(own(x.clone()))
        eager = first(rewritten(x.clone()))
        got = first(compiled(x.clone()))
    assert report.all_fused and {b.dtype for b in report.layers} == {"bf16"}, report
    assert want.dtype == eager.dtype == got.dtype
    torch.testing.assert_close(eager, want, **SAME_BF16)
    torch.testing.assert_close(got, want, **SAME_BF16)
