"""Checks inside the ops: NaN logits, ids out of range, tensors that do not fit together."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moec.backends.reference import run_graph
from moec.runtime import checks, programs
from moec.runtime.checks import CheckError, MoecWarning
from tests.backends.cases import ExpertsCase, route_graph

CASE = ExpertsCase()
ROUTER = route_graph(8, k=2)


def nan_logits() -> torch.Tensor:
    logits = torch.randn(5, 8)
    logits[3, 2] = float("nan")
    return logits


def route(logits: torch.Tensor, label: str = "layers.3", mode: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    program = programs.register(ROUTER, "aten", label=label, checks=mode)
    weights, ids = torch.ops.moec.route([logits], program.key)
    return weights, ids


def test_nan_warns_once_per_block_and_goes_on() -> None:
    logits = nan_logits()
    with pytest.warns(MoecWarning, match=r"'layers\.3'.*1 of 5 tokens"):
        weights, ids = route(logits)
    want_weights, want_ids = run_graph(ROUTER, [logits])
    assert torch.equal(ids, want_ids)
    assert torch.equal(weights.isnan(), want_weights.isnan())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(logits)
    with pytest.warns(MoecWarning, match=r"'layers\.4'"):
        route(logits, "layers.4")


def test_strict_makes_it_an_error() -> None:
    with pytest.raises(CheckError, match="NaN in the router logits") as error:
        route(nan_logits(), mode="strict")
    assert error.value.hint
    checks.set_mode("strict")
    with pytest.raises(CheckError):
        route(nan_logits())


def test_off_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(nan_logits(), mode="off")
        checks.set_mode("off")
        route(nan_logits())


def test_infinities_are_no_nan() -> None:
    logits = torch.randn(5, 8)
    logits[0, 0], logits[1, 0] = float("inf"), float("-inf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(logits, mode="strict")


def test_no_tokens_no_complaint() -> None:
    route(torch.empty(0, 8), mode="strict")
    program = programs.register(CASE.graph(), "aten")
    inputs = CASE.inputs(0)
    assert torch.ops.moec.experts(*inputs[:3], inputs[3:], program.key).shape == (0, CASE.hidden)


def test_a_misspelt_mode_names_the_nearest() -> None:
    with pytest.raises(CheckError, match="did you mean 'strict'"):
        checks.set_mode("strickt")


@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_ids_out_of_range(bad: int, backend: str, tokens: int) -> None:
    inputs = CASE.inputs(tokens)
    inputs[1][-1, 1] = bad
    program = programs.register(CASE.graph(), backend, label="layers.3")
    with pytest.raises(CheckError, match=rf"'layers\.3': expert id {bad} is out of range: the layer has 5 experts"):
        torch.ops.moec.experts(*inputs[:3], inputs[3:], program.key)


def test_sentinels_are_in_range() -> None:
    case = ExpertsCase(sentinels=True)
    inputs = case.inputs(9)
    assert (inputs[1] < 0).any()
    assert (inputs[1] >= case.experts).any()
    program = programs.register(case.graph(), "aten")
    assert torch.equal(torch.ops.moec.experts(*inputs[:3], inputs[3:], program.key), run_graph(case.graph(), inputs)[0])


def test_mixed_types_and_devices() -> None:
    inputs = CASE.inputs(9)
    program = programs.register(CASE.graph(), "aten", label="layers.3")
    with pytest.raises(CheckError, match=r"'layers\.3': the tokens are torch\.bfloat16, weight 0 is torch\.float32"):
        torch.ops.moec.experts(inputs[0].bfloat16(), *inputs[1:3], inputs[3:], program.key)
    with pytest.raises(CheckError, match="tokens are on cpu, weight 1 is on meta"):
        checks.check_same(inputs[0], [inputs[3], inputs[4].to("meta")], 2, program)


def test_they_work_in_compiled_graphs() -> None:
    torch._dynamo.reset()
    program = programs.register(CASE.graph(), "aten", label="layers.3")
    router = programs.register(route_graph(5, k=3), "aten", label="layers.3", checks="strict")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(logits: torch.Tensor, shift: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.ops.moec.route([logits], router.key)
        out: torch.Tensor = torch.ops.moec.experts(inputs[0], ids + shift, weights, list(inputs[3:]), program.key)
        return out

    inputs, logits, zero = CASE.inputs(9), torch.randn(9, 5), torch.tensor(0)
    layer(logits, zero, *inputs)
    with pytest.raises(CheckError, match="out of range"):
        layer(logits, torch.tensor(5), *inputs)
    logits[2, 2] = float("nan")
    with pytest.raises(CheckError, match="NaN"):
        layer(logits, zero, *inputs)


class Calls(TorchDispatchMode):
    """The names of all ATen calls made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_they_read_logits_and_ids_once_each() -> None:
    case = ExpertsCase(experts=16, top_k=4, hidden=512, inner=256)
    inputs, logits = case.inputs(64), torch.randn(64, 16)
    program = programs.register(case.graph(), "aten")
    with Calls() as calls, torch.no_grad():
        checks.check_logits(logits, program)
        checks.check_ids(inputs[1], 16, program)
        checks.check_same(inputs[0], inputs[3:], 2, program)
    assert [n for n in calls.names if n != "_local_scalar_dense"] == ["sum", "aminmax"]
