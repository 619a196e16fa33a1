"""Weights that are tensors of another kind, lie otherwise or hold no values; and copies, files and casts of models.

A block with such weights is fused and right, or left to PyTorch with its reason; never wrong.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec import MoecWarning
from moec.runtime import counters
from tests.compile.blocks import Block, Layers, tokens
from tests.compile.test_changed_weights import BACKENDS, WEIGHTS, same
from tests.compile.watch import Watch, moec_compile


class Scaled(torch.Tensor):
    """A weight kept as int8 and a scale: a wrapper whose memory is not its values, as quantised weights are."""

    inner: torch.Tensor
    scale: float

    @staticmethod
    def __new__(cls, inner: torch.Tensor, scale: float) -> Scaled:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.inner, made.scale = inner, scale
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Scaled({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["inner"], self.scale

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, torch.Tensor], scale: float, size: Any, stride: Any) -> Scaled:
        return Scaled(tensors["inner"], scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].inner, args[0].scale)

        def plain(t: Any) -> Any:
            return t.inner.float() * t.scale if isinstance(t, Scaled) else t

        return func(*torch.utils._pytree.tree_map(plain, args), **torch.utils._pytree.tree_map(plain, kwargs or {}))


class Tagged(torch.Tensor):
    """A subclass that adds nothing to what its memory is."""


def quantise(block: Block, name: str) -> None:
    inner = (getattr(block, name).detach() * 50).round().clamp(-127, 127).to(torch.int8)
    setattr(block, name, nn.Parameter(Scaled(inner, 0.02), requires_grad=False))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_wrapped_weight_stays_with_pytorch(name: str, inner: str) -> None:
    model = Layers(Block(), Block(seed=1))
    quantise(model.layers[0], name)
    with moec.recording() as report, torch.no_grad(), pytest.warns(MoecWarning, match=f"{name} is a Scaled") as told:
        got = moec_compile(model, inner=inner)(tokens())
    same(got, model(tokens()))
    assert [b.fused for b in report.layers] == [False, True]
    assert "no plain tensor that kernels can read" in report.layers[0].reason
    assert len([w for w in told if issubclass(w.category, MoecWarning)]) == 1


class Unwrapping(nn.Module):
    """Takes the values out of the wrapper in its forward: what the GEMMs read is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        quantise(self.block, "down")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = self.block.down.inner.float() * self.block.down.scale  # type: ignore[union-attr]
        return torch.func.functional_call(self.block, {"down": down}, (x,))


def test_a_weight_unwrapped_by_the_model_is_fused() -> None:
    model = Unwrapping()
    with moec.recording() as report, torch.no_grad():
        same(moec_compile(model)(tokens()), model(tokens()))
    assert report.all_fused


def test_a_plain_subclass_is_fused() -> None:
    model = Layers(Block())
    model.layers[0].down = nn.Parameter(model.layers[0].down.detach().as_subclass(Tagged))
    with moec.recording() as report, torch.no_grad():
        same(torch.Tensor(moec_compile(model)(tokens())), torch.Tensor(model(tokens())))
    assert report.layers


def strided(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values, lying otherwise."""
    if kind == "offset":
        return torch.cat([torch.full_like(weight[:1], 9.0), weight])[1:]
    if kind == "rows apart":
        return torch.cat([weight, torch.full_like(weight, 9.0)], dim=2)[:, :, : weight.shape[2]]
    if kind == "columns apart":
        return torch.stack([weight, torch.full_like(weight, 9.0)], dim=-1)[..., 0]
    if kind == "experts reversed in memory":
        return weight.transpose(0, 2).contiguous().transpose(0, 2)
    if kind == "expanded":
        return weight[:1].expand_as(weight)
    z = torch.complex(torch.zeros_like(weight), -weight)
    return torch.imag(z.conj())  # "negative": the memory holds the values with the other sign


KINDS = ["offset", "rows apart", "columns apart", "experts reversed in memory", "expanded", "negative"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_lie_otherwise(backend: str) -> None:
    for kind in KINDS:
        model = Layers(Block())
        for name in WEIGHTS:
            weight = strided(getattr(model.layers[0], name).detach(), kind)
            assert kind != "negative" or weight.is_neg()
            setattr(model.layers[0], name, nn.Parameter(weight, requires_grad=False))
        torch._dynamo.reset()
        with moec.recording() as report, torch.no_grad():
            same(moec_compile(model, backends=[backend])(tokens()), model(tokens()))
        assert report.layers, kind


def test_a_model_on_meta_says_so() -> None:
    with moec.recording() as report, pytest.warns(MoecWarning, match="is on the meta device, which holds no values"):
        out = torch.compile(Layers(Block()).to("meta"), backend="moec", options={"inner": "eager"})(tokens().to("meta"))
    assert out.device.type == "meta"
    assert "load or initialise the model" in report.layers[0].reason


# --- copies, files, casts --------------------------------------------------------------------------------------------


def test_a_copy_of_a_compiled_model_has_weights_of_its_own() -> None:
    model = Layers(Block())
    compiled = moec_compile(model)
    with torch.no_grad():
        want = compiled(tokens()).clone()
        other = copy.deepcopy(compiled)
        for parameter in other.parameters():
            parameter.mul_(2)
        changed = Layers(Block())
        for parameter in changed.parameters():
            parameter.mul_(2)
        same(other(tokens()), changed(tokens()))
        same(compiled(tokens()), want)


def test_a_compiled_model_goes_through_a_file() -> None:
    model = Layers(Block())
    compiled = moec_compile(model)
    with torch.no_grad():
        compiled(tokens())
        file = io.BytesIO()
        torch.save(compiled, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        same(again(tokens()), model(tokens()))
        assert pickle.dumps(compiled)
    counters.reset()
    again(tokens())
    assert counters.snapshot().by_name["moec::experts"] == 1


def test_cast_after_compile() -> None:
    model = Layers(Block())
    seen = Watch(model)
    compiled = moec_compile(model, watch=seen)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            model.to(dtype)
            x = tokens().to(dtype)
            torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)
    assert seen.ops["moec::experts"] == 3
    assert not seen.expert_reads
