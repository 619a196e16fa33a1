"""Alike layers share one compiled region; whatever makes a layer different keeps it out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

from moec.readiness import prepare
from tests.support.models import FAMILIES, build, inputs

LAYERS = 2  # the fewest that share a region with regions=True
SAME_FUNCTION = (0.0, 1e-5)  # the same operations; gpt-oss takes another attention path while compiling
KINDS = {"gpt_oss": 2, "qwen3_next": 2}  # these mix two kinds of attention


class Seen:
    """A backend that keeps the graphs it is handed and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return gm.forward

    def regions(self) -> list[str]:
        """Names of the bodies that the last graph calls, in order."""
        return [str(n.args[1]) for n in self.graphs[-1].graph.nodes if _is_region(n)]

    def computing_nodes(self) -> int:
        """Nodes of the last graph and its bodies that compute something: no inputs, no calls of bodies."""
        modules = [m for m in self.graphs[-1].modules() if isinstance(m, torch.fx.GraphModule)]
        return sum(
            node.op.startswith("call_") and not _is_region(node) and not _is_region(node.args[0])
            for module in modules
            for node in module.graph.nodes
        )


def _is_region(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and node.target is torch.ops.higher_order.invoke_subgraph


def compiled(model: nn.Module) -> tuple[Seen, Callable[..., Any]]:
    seen = Seen()
    return seen, torch.compile(model, backend=seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_body_a_kind_of_layer_and_the_same_bits(family: str) -> None:
    kinds = KINDS.get(family, 1)
    model = build(family, layers=LAYERS * kinds)
    with torch.no_grad():
        want = model(**inputs(family, 2, 9)).logits
        report = prepare(model, regions=True)
        seen, run = compiled(model)
        got = run(**inputs(family, 2, 9)).logits
    named = [name for group in report.regions for name in group.layers]
    assert sorted(named) == sorted(f"model.layers.{i}" for i in range(LAYERS * kinds))
    assert not report.left_out
    assert len(seen.graphs) == 1
    assert len(seen.regions()) == LAYERS * kinds
    assert len(report.regions) == kinds
    assert len(set(seen.regions())) <= kinds  # gpt-oss's two kinds differ in the mask they are given, not in code
    torch.testing.assert_close(got, want, rtol=0, atol=SAME_FUNCTION[family == "gpt_oss"])


def test_what_the_backend_must_compile_does_not_grow_with_depth() -> None:
    counts = []
    for layers in (3, 9):
        model = build("qwen3_moe", layers=layers)
        prepare(model, regions=True)
        torch._dynamo.reset()
        seen, run = compiled(model)
        with torch.no_grad():
            run(**inputs("qwen3_moe", 1, 5))
        assert len(seen.regions()) == layers
        counts.append(seen.computing_nodes())
    assert counts[0] == counts[1]


def test_other_lengths_make_the_graphs_they_make_without_regions() -> None:
    counts = []
    for ready in (False, True):
        model = build("mixtral", layers=LAYERS)
        if ready:
            prepare(model, regions=True)
        torch._dynamo.reset()
        seen, run = compiled(model)
        with torch.no_grad():
            for length in (12, 20):
                torch.testing.assert_close(
                    run(**inputs("mixtral", 1, length)).logits, model(**inputs("mixtral", 1, length)).logits,
                    rtol=0, atol=1e-5,
                )  # fmt: skip
        counts.append(len(seen.graphs))
    assert counts[0] == counts[1]


def test_with_a_cache_the_blocks_are_regions_and_the_cache_is_written_outside() -> None:
    model = build("mixtral", layers=LAYERS)
    prepare(model, regions=True)
    seen, run = compiled(model)
    tokens = inputs("mixtral", 2, 9)["input_ids"]
    logits = []
    with torch.no_grad():
        for call in (model, run):
            cache = StaticCache(config=model.config, max_cache_len=16)
            step = call(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1:]
            logits.append([step])
            for _ in range(3):
                step = call(input_ids=step.argmax(-1), past_key_values=cache, use_cache=True).logits
                logits[-1].append(step)
    for want, got in zip(*logits, strict=True):
        assert torch.equal(got.argmax(-1), want.argmax(-1))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert len(seen.graphs) == 2  # prefill and decode
    assert len(seen.regions()) == LAYERS
    writes = [n for n in seen.graphs[-1].graph.nodes if n.target == "index_copy_"]
    assert len(writes) == 2 * LAYERS


def test_training_is_compiled_without_regions_and_its_gradients_are_eagers() -> None:
    model = build("mixtral", train=True, layers=LAYERS)
    batch = inputs("mixtral", 2, 9)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    prepare(model, regions=True)
    seen, run = compiled(model)
    run(**batch, labels=batch["input_ids"]).loss.backward()
    assert seen.regions() == []
    for name, parameter in model.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], rtol=0, atol=1e-6, msg=name)


def halve(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 0.5


@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_a_layer_with_a_hook_is_compiled_by_itself_and_the_hook_acts(when: str) -> None:
    model = build("mixtral", layers=LAYERS + 1)
    if when == "before prepare":
        model.model.layers[1].mlp.register_forward_hook(halve)
    report = prepare(model, regions=True)
    if when == "after prepare":
        model.model.layers[1].mlp.register_forward_hook(halve)
    else:
        assert [left.name for left in report.left_out] == ["model.layers.1"]
        assert "mlp has a hook (forward hook)" in report.left_out[0].reason
    seen, run = compiled(model)
    with torch.no_grad():
        want = model(**inputs("mixtral", 2, 9)).logits
        assert torch.equal(run(**inputs("mixtral", 2, 9)).logits, want)
    assert len(seen.regions()) == LAYERS


def test_router_logits_and_auxiliary_loss_come_out_of_regions() -> None:
    model = build("mixtral", layers=LAYERS)
    prepare(model, regions=True)
    batch = inputs("mixtral", 2, 9)
    _, run = compiled(model)
    with torch.no_grad():
        want = model(**batch, labels=batch["input_ids"], output_router_logits=True)
        got = run(**batch, labels=batch["input_ids"], output_router_logits=True)
    assert torch.equal(got.aux_loss, want.aux_loss)
    assert len(got.router_logits) == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(got.router_logits, want.router_logits, strict=True))


def _another_dtype(layer: nn.Module) -> None:
    layer.mlp.gate.double()


def _another_width(layer: nn.Module) -> None:
    layer.mlp.gate.weight = nn.Parameter(torch.randn(6, 64))


def _another_constant(layer: nn.Module) -> None:
    layer.input_layernorm.variance_epsilon = 1e-3


def _another_mode(layer: nn.Module) -> None:
    layer.self_attn.train()


def _another_class(layer: nn.Module) -> None:
    layer.input_layernorm = nn.Identity()


def _another_forward(layer: nn.Module) -> None:
    layer.mlp.forward = lambda x: x


@pytest.mark.parametrize(
    "change", [_another_dtype, _another_width, _another_constant, _another_mode, _another_class, _another_forward]
)
def test_a_layer_that_differs_is_left_out_and_named(change: Callable[[nn.Module], None]) -> None:
    model = build("mixtral", layers=LAYERS + 1)
    change(model.model.layers[2])
    report = prepare(model, regions=True)
    assert [left.name for left in report.left_out] == ["model.layers.2"]
    assert [len(group.layers) for group in report.regions] == [LAYERS]


def test_a_constant_changed_after_prepare_is_seen() -> None:
    model = build("mixtral", layers=LAYERS + 1)
    prepare(model, regions=True)
    _another_constant(model.model.layers[2])
    seen, run = compiled(model)
    with torch.no_grad():
        assert torch.equal(run(**inputs("mixtral", 2, 9)).logits, model(**inputs("mixtral", 2, 9)).logits)
    assert len(seen.regions()) == LAYERS


@pytest.mark.parametrize(("regions", "layers", "groups"), [("auto", 3, 0), (True, 3, 1), (False, 4, 0), (True, 1, 0)])
def test_how_many_layers_make_a_region(regions: Any, layers: int, groups: int) -> None:
    model = build("mixtral", layers=layers)
    report = prepare(model, regions=regions)
    assert len(report.regions) == groups
    named = sum(len(group.layers) for group in report.regions) + len(report.left_out)
    assert named == (layers if regions else 0)


def test_a_prepared_model_can_be_copied_and_pickled() -> None:
    model = build("mixtral", layers=LAYERS)
    prepare(model, regions=True)
    batch = inputs("mixtral", 1, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(**batch).logits, model(**batch).logits)
            _, run = compiled(other)
            assert torch.equal(run(**batch).logits, model(**batch).logits)


def test_a_copy_that_was_changed_does_what_it_does() -> None:
    """The copy carries the marks; likeness is a matter of the original's layers, not of its own."""
    model = build("mixtral", layers=LAYERS)
    prepare(model, regions=True)
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    batch = inputs("mixtral", 1, 5)
    with torch.no_grad():
        _, run = compiled(other)
        assert torch.equal(run(**batch).logits, other(**batch).logits)
        assert not torch.equal(other(**batch).logits, model(**batch).logits)


def test_a_copy_can_be_prepared_itself() -> None:
    model = build("mixtral", layers=LAYERS)
    prepare(model, regions=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        report = prepare(other, regions=True)
        assert not report.left_out
        assert [len(group.layers) for group in report.regions] == [LAYERS]
        report.undo()
        assert all("forward" not in vars(module) for module in other.modules())
