"""The cpu backend's routers against the definition in torch: the same experts, ties included, and the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.backends.aten import AtenBackend
from moec.backends.base import Kernel
from moec.backends.cpu import CpuBackend, route
from moec.backends.cpu.build import compiler
from moec.backends.cpu.isa import LEVELS, missing
from moec.backends.reference import run_graph
from moec.ir.core import Graph
from moec.ir.ops.moe_route import score
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import DTYPES, TensorType
from tests.backends.cases import close, relative_error, route_graph

BACKEND = CpuBackend()
HERE = [name for name, isa in LEVELS.items() if not missing(isa)]
pytestmark = pytest.mark.skipif(compiler() is None or not HERE, reason="no C++ compiler, or no AVX2 in this processor")
TOKENS = (0, 1, 7, 64, 1000)
WEIGHTS = {"f32": 2e-6, "f16": 2e-3, "bf16": 1.6e-2}
"""Largest relative difference of a weight: two units in the last place of its type."""


@dataclass(frozen=True)
class RouterCase:
    """A router and its inputs' types. ``level`` is the place in ``HERE``."""

    experts: int
    k: int
    logits: str = "f32"
    score: str = "f32"
    result: str = "f32"
    bias: str = ""
    level: int = -1
    attrs: dict[str, Any] = field(default_factory=dict)

    def graph(self) -> Graph:
        attrs = {"k": self.k, "score_dtype": DTYPES[self.score], **self.attrs}
        g = route_graph(self.experts, self.logits, bool(self.bias), self.result, **attrs)
        if self.bias:
            g.args[1].type = TensorType.of(self.bias, self.experts)
        return g

    def inputs(self, tokens: int, seed: int = 0, spread: float = 2.0) -> list[Tensor]:
        torch.manual_seed(seed)
        logits = (torch.randn(tokens, self.experts) * spread).to(TO_TORCH[self.logits])
        return [logits, *([(torch.randn(self.experts) / 8).to(TO_TORCH[self.bias])] if self.bias else [])]

    def kernel(self) -> Kernel:
        graph, target = self.graph(), f"cpu:{HERE[self.level]}"
        support = BACKEND.supports(graph.ops[0], target)
        assert support.ok, support.reason
        return BACKEND.load(BACKEND.lower(graph, target))


DEEPSEEK = {
    "scoring": "sigmoid", "groups": 8, "top_groups": 4, "group_score": "top2_sum", "group_fill": 0.0,
    "renormalize": True, "renorm_eps": 1e-20, "scale": 2.5,
}  # fmt: skip
CASES = {
    "mixtral": RouterCase(8, 2, attrs={"renormalize": True}),
    "olmoe": RouterCase(64, 8, level=0),
    "qwen3": RouterCase(128, 8, logits="bf16", result="bf16", attrs={"renormalize": True}),
    "deepseek_v3": RouterCase(256, 8, bias="f32", attrs=DEEPSEEK),
    "deepseek_v2_unsorted": RouterCase(
        60, 8, attrs={"groups": 6, "top_groups": 3, "scale": 16.0, "sorted": False}, level=0
    ),
    "odd_groups": RouterCase(60, 2, "bf16", "bf16", "f32", "bf16", attrs={**DEEPSEEK, "groups": 20, "sorted": False}),
    "gpt_oss": RouterCase(64, 8, "bf16", "bf16", "bf16", bias="f32", attrs={"order": "topk_first"}),
    "all_of_them": RouterCase(60, 60, attrs={"scoring": "sigmoid", "renormalize": True}),
    "best_of_many": RouterCase(512, 1, attrs={"scoring": "sigmoid"}, level=0),
    "eight_of_many": RouterCase(512, 8, attrs={"sorted": False}),
    "all_of_many": RouterCase(256, 256, logits="f16", result="f16"),
    "logits_alone": RouterCase(128, 1, attrs={"scoring": "identity", "scale": 0.5}),
    "deepseek_v2": RouterCase(
        64, 6, attrs={"groups": 8, "top_groups": 1, "group_fill": 0.0, "masked_weights": True, "scale": 16.0}
    ),
    "moge": RouterCase(64, 8, attrs={"groups": 8, "per_group": 1, "by_group": True}),
    "moge_of_maxima": RouterCase(
        64, 8, "bf16", result="bf16", attrs={"groups": 8, "per_group": 1, "by_group": True, "ties": "first"}
    ),
    "moge_biased": RouterCase(
        60, 15, bias="f32", level=0, attrs={"scoring": "sigmoid", "groups": 5, "per_group": 3, "by_group": True}
    ),
    "moge_unsorted": RouterCase(64, 8, attrs={"groups": 4, "per_group": 2, "by_group": True, "sorted": False}),
    "moge_best_first": RouterCase(64, 8, attrs={"groups": 4, "per_group": 2, "renormalize": True}),
    "switch": RouterCase(128, 1, attrs={"ties": "first"}),
    "first_of_equal": RouterCase(60, 7, bias="f32", attrs={"scoring": "sigmoid", "ties": "first"}),
    "softplus": RouterCase(128, 8, bias="f32", attrs={"scoring": "sqrtsoftplus", "renormalize": True}),
    "narrow_scores": RouterCase(64, 2, "bf16", "bf16", "f32", "bf16", attrs={"renormalize": True, "scale": 1.5}),
    "half_scores": RouterCase(
        8, 8, "f16", "f16", "f16", "f32", attrs={"scoring": "sigmoid", "renorm_eps": 1e-3, "renormalize": True}
    ),
}
EXACT = [name for name, case in CASES.items() if case.attrs.get("scoring") != "sqrtsoftplus"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def selection(case: RouterCase, inputs: list[Tensor]) -> Tensor:
    """What the definition takes the top k of, without groups."""
    logits = inputs[0].to(TO_TORCH[case.score])
    if case.attrs.get("order") == "topk_first":
        return logits
    scores = score(logits, case.attrs.get("scoring", "softmax"))
    return scores + inputs[1] if case.bias else scores


def near(case: RouterCase, inputs: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Where two experts' scores are within two units in the last place."""
    values = selection(case, inputs)
    x, y = values.gather(1, a).double(), values.gather(1, b).double()
    return (x - y).abs() <= 2 * torch.finfo(values.dtype).eps * torch.maximum(x.abs(), y.abs())


def check(case: RouterCase, kernel: Kernel, inputs: list[Tensor]) -> None:
    before = [t.clone() for t in inputs]
    want, want_ids = run_graph(case.graph(), inputs)
    got, ids = kernel.forward(inputs)
    assert (got.dtype, ids.dtype, got.shape, ids.shape) == (want.dtype, torch.int64, want.shape, want_ids.shape)
    assert bool(((ids == want_ids) | near(case, inputs, ids, want_ids)).all())
    same = (ids == want_ids).all(dim=1)
    torch.testing.assert_close(got[same], want[same], rtol=max(WEIGHTS[case.result], WEIGHTS[case.score]), atol=1e-30)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("name", CASES)
def test_experts_and_weights_are_those_of_the_definition(name: str) -> None:
    case = CASES[name]
    kernel = case.kernel()
    for tokens in TOKENS:
        for spread in (0.02, 2.0, 12.0):
            check(case, kernel, case.inputs(tokens, tokens, spread))


@pytest.mark.parametrize("name", EXACT)
def test_ties_are_broken_as_torch_does(name: str) -> None:
    """Rows of few different values: which of them are chosen, and in which order, is up to torch's algorithm."""
    case = CASES[name]
    kernel = case.kernel()
    for values in (1, 2, 5, 40):
        torch.manual_seed(values)
        # Rows for a whole number of vectors, where torch computes every score alike.
        logits = torch.randint(0, values, (256, case.experts)).to(TO_TORCH[case.logits]) / 4
        logits[::3] *= torch.randint(0, 2, (86, case.experts)) * 2 - 1  # zeros of both signs in a row
        inputs = [logits, *(torch.zeros_like(t) for t in case.inputs(1)[1:])]
        _, want = run_graph(case.graph(), inputs)
        assert torch.equal(kernel.forward(inputs)[1], want), values


@pytest.mark.parametrize("name", ["narrow_scores", "half_scores", "gpt_oss", "odd_groups"])
def test_narrow_types_are_rounded_where_torch_rounds(name: str) -> None:
    """A rounding left out moves many of these: neighbours in bf16 are 0.4 % apart."""
    case = CASES[name]
    inputs = case.inputs(1024)
    want, want_ids = run_graph(case.graph(), inputs)
    got, ids = case.kernel().forward(inputs)
    assert float((ids == want_ids).float().mean()) > 0.9999
    assert float((got == want).float().mean()) > 0.999


@pytest.mark.parametrize("name", ["eight_of_many", "gpt_oss", "best_of_many", "logits_alone"])
def test_scores_have_torchs_bits(name: str) -> None:
    """A softmax adds up over as many lanes as torch's, where both use the widest vectors."""
    case = CASES[name]
    widest = {"avx2": "AVX2"}.get(HERE[case.level], "AVX512")
    if case.attrs.get("scoring", "softmax") == "softmax" and torch.backends.cpu.get_cpu_capability() != widest:
        pytest.skip("torch adds up over another number of lanes than this kernel")
    inputs = case.inputs(128)
    want, want_ids = run_graph(case.graph(), inputs)
    got, ids = case.kernel().forward(inputs)
    assert torch.equal(ids, want_ids)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "deepseek_v3",
        "odd_groups",
        "gpt_oss",
        "best_of_many",
        "logits_alone",
        "moge_best_first",
        "moge_of_maxima",
        "first_of_equal",
    ],
)
def test_infinities_and_nan_do_as_in_torch(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs(96)
    strange = torch.rand(inputs[0].shape)
    for value, low in ((torch.nan, 0.0), (torch.inf, 0.02), (-torch.inf, 0.04)):
        inputs[0][(strange >= low) & (strange < low + 0.02)] = value
    inputs[0][-3:] = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]])
    want, want_ids = run_graph(case.graph(), inputs)
    got, ids = case.kernel().forward(inputs)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(got, want, rtol=WEIGHTS[case.result], atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "all_of_them", "softplus"])
def test_a_token_has_the_same_bits_whatever_its_mates_and_the_threads(name: str) -> None:
    case = CASES[name]
    kernel, inputs = case.kernel(), case.inputs(1001)
    whole = kernel.forward(inputs)
    for cut in (slice(0, 1), slice(7, 40), slice(500, 1001)):
        few = kernel.forward([inputs[0][cut], *inputs[1:]])
        assert all(torch.equal(a, b[cut]) for a, b in zip(few, whole, strict=True)), cut
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(kernel.forward(inputs), whole, strict=True))


def test_the_target_says_how_many_threads() -> None:
    graph = CASES["mixtral"].graph()
    for target, threads in (("cpu", 0), ("cpu,cores=3", 3)):
        kernel = BACKEND.load(BACKEND.lower(graph, target))
        assert isinstance(kernel, route.CpuRoute)
        assert kernel.threads == threads
        assert kernel.forward(CASES["mixtral"].inputs(5000))[1].shape == (5000, 2)


def test_inputs_are_read_where_they_lie() -> None:
    case = CASES["deepseek_v3"]
    kernel, (logits, bias) = case.kernel(), case.inputs(9)
    want = kernel.forward([logits, bias])
    padded = torch.cat([logits, logits], dim=1)[:, : case.experts]
    spread = torch.stack([logits, -logits], dim=-1)[..., 0]
    column = torch.stack([bias, -bias], dim=-1)[:, 0]
    for moved in ([padded, bias], [spread, bias], [logits.T.contiguous().T, column], [logits[:1].expand(9, -1), bias]):
        got = kernel.forward(moved)
        rows = 1 if moved[0].stride(0) == 0 else 9
        assert all(torch.equal(a[:rows], b[:rows]) for a, b in zip(got, want, strict=True))
        assert torch.equal(got[1][rows:], want[1][:1].expand(9 - rows, -1))


def test_gradients_are_those_of_the_definition() -> None:
    case = CASES["mixtral"]
    kernel, inputs = case.kernel(), case.inputs(6)
    aten = AtenBackend()
    definition = aten.load(aten.lower(case.graph(), "cpu"))
    grads = [torch.randn(6, case.k), None]
    (got,), (want,) = (k.backward(grads, inputs, [True]) for k in (kernel, definition))
    assert got is not None
    assert want is not None
    assert relative_error(got, want) <= 1e-6
    assert float(got.abs().max()) > 0
    assert kernel.backward([None, None], inputs, [False]) == [None]


def test_what_it_does_not_take_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(case: RouterCase, target: str = "cpu") -> str:
        support = BACKEND.supports(case.graph().ops[0], target)
        assert not support.ok
        return support.reason

    assert "f64" in reason(RouterCase(8, 2, logits="f64"))
    assert "f64" in reason(RouterCase(8, 2, score="f64"))
    assert "f64" in reason(RouterCase(8, 2, bias="f64"))
    assert "no CPU" in reason(RouterCase(8, 2), "cuda:sm90")
    assert "3 groups" in reason(RouterCase(8, 2, attrs={"groups": 3, "top_groups": 2}))
    assert "best two" in reason(RouterCase(8, 2, attrs={**DEEPSEEK, "groups": 8}))
    assert "range of f16" in reason(RouterCase(8, 2, score="f16", attrs={**DEEPSEEK, "groups": 4, "group_fill": -1e9}))
    assert "groups of one size" in reason(RouterCase(10, 4, attrs={"groups": 4, "per_group": 1, "by_group": True}))
    assert "at most" in reason(RouterCase(5000, 2))
    region = Graph("router")
    logits = region.add_arg(TensorType.of("f32", "T", 8))
    close(region, logits, logits)
    graph = route_graph(8, k=8, region=region)
    assert "region" in BACKEND.supports(graph.ops[0], "cpu").reason
    monkeypatch.setattr(route, "_torch_function", lambda name: 0)
    assert "exponential" in reason(CASES["mixtral"])
    assert BACKEND.supports(CASES["logits_alone"].graph().ops[0], "cpu").ok
