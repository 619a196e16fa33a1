"""A training step: the block's forward is one op, its gradients are eager's, and it saves no more than eager does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers

import moec
from moec.runtime import counters
from tests.compile.watch import Graphs, Watch, moec_compile
from tests.support.models import SHARED_EXPERTS, build, inputs

GRADIENTS = 2e-5
"""Largest |difference| of two fp32 gradients of one parameter, relative to max(1, max |gradient|)."""
LOSSES = 1e-6


@dataclass
class Saved:
    """Bytes that autograd saves: each storage once, parameters not at all."""

    model: torch.nn.Module
    bytes: int = 0
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.seen = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        self.kept: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.kept.append(tensor)  # a freed address could come again and not be counted
            self.bytes += storage.nbytes()
        return tensor


@dataclass
class Step:
    loss: float
    gradients: dict[str, torch.Tensor]
    saved: int


def step(model: transformers.PreTrainedModel, run: Any, batch: dict[str, torch.Tensor]) -> Step:
    model.zero_grad()
    saved = Saved(model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        loss = run(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.item(), gradients, saved.bytes)


def same_gradients(got: Step, want: Step) -> None:
    assert abs(got.loss - want.loss) <= LOSSES * abs(want.loss)
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        error = (got.gradients[name] - gradient).abs().max().item() / max(1.0, gradient.abs().max().item())
        assert error <= GRADIENTS, f"gradient of {name} is off by {error:.2e}"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "inner", "checkpointing"),
    [
        ("mixtral", "eager", False),
        ("mixtral", "eager", True),
        ("mixtral", "aot_eager", False),
        ("mixtral", "aot_eager", True),
        ("deepseek_v3", "eager", False),
        ("deepseek_v3", "eager", True),
        pytest.param("deepseek_v3", "aot_eager", False, marks=SLOW),
        pytest.param("deepseek_v3", "aot_eager", True, marks=SLOW),
        pytest.param("deepseek_v3", "inductor", False, marks=SLOW),
        pytest.param("mixtral", "inductor", True, marks=SLOW),
    ],
)
def test_training_step(family: str, inner: str, checkpointing: bool) -> None:
    layers = 1 if inner == "inductor" else 2
    model = build(family, train=True, layers=layers)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = inputs(family, 2, 12)
    want = step(model, model, batch)
    with moec.recording() as report:
        compiled = moec_compile(model, inner=inner)
        step(model, compiled, batch)  # compiles
        counters.reset()
        got = step(model, compiled, batch)
    assert report.graphs == 1
    assert len(report.layers) == layers
    assert report.all_fused, report
    ran, experts = counters.snapshot().by_name, layers * (1 + (family in SHARED_EXPERTS))
    assert ran["moec::experts_backward"] == experts
    assert experts <= ran["moec::experts"] <= experts * (2 if checkpointing else 1)
    same_gradients(got, want)
    allowed = want.saved
    if checkpointing and inner == "eager":  # Dynamo's checkpoint op keeps a few small inputs more than the eager one
        torch._dynamo.reset()
        allowed = step(model, torch.compile(model, backend=Graphs()), batch).saved
        assert allowed < want.saved * 1.1
    assert got.saved <= allowed


def test_router_gets_its_gradient_through_the_weights() -> None:
    """What is compared above is not zero."""
    model = build("deepseek_v3", train=True, layers=1)
    result = step(model, moec_compile(model), inputs("deepseek_v3", 2, 12))
    for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        assert result.gradients[f"model.layers.0.mlp.{part}"].abs().max() > GRADIENTS * 10


def test_the_block_alone_saves_at_most_what_eager_saves() -> None:
    """Without the layers around it: the tokens, the routing and nothing between the two GEMMs."""
    block = build("mixtral", train=True, layers=1).model.layers[0].mlp
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))

    def bytes_saved(run: Any) -> int:
        saved = Saved(block)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            out = run(x.clone().requires_grad_())
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        return saved.bytes

    compiled = moec_compile(block, inner="aot_eager")
    bytes_saved(compiled)
    ours, theirs = bytes_saved(compiled), bytes_saved(block)
    assert ours < theirs / 2, f"{ours} bytes against {theirs}"


def test_some_parameters_frozen() -> None:
    model = build("mixtral", train=True, layers=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name and "embed" not in name)
    batch = inputs("mixtral", 2, 12)
    want = step(model, model, batch)
    seen = Watch(model)
    got = step(model, moec_compile(model, watch=seen), batch)
    assert not seen.expert_reads
    assert not any("experts" in name for name in got.gradients)
    same_gradients(got, want)
