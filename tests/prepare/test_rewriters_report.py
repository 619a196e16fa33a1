"""What the report says of rewritten modules, in which modes they run, and how they are undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.readiness import prepare
from moec.readiness.experts import lookalikes
from moec.readiness.rewriters import is_rewritten
from moec.readiness.rewriters.known import digest
from moec.readiness.rewriters.registry import REWRITERS
from tests.compile.watch import moec_compile
from tests.prepare.test_experts import snapshot
from tests.prepare.undecorated import EXPERTS, FAMILIES, HIDDEN, INNER, block, first, tokens

ZERO_EXPERTS = 3


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_leaves_no_trace(family: str) -> None:
    model = nn.ModuleList([block(family)])
    before, keys = snapshot(model), list(model.state_dict())
    report = prepare(model)
    assert report.rewritten
    assert list(model.state_dict()) == keys
    assert snapshot(model) != before
    report.undo()
    assert snapshot(model) == before


def test_the_report_lists_what_was_rewritten_and_ignores_nothing_of_it() -> None:
    model = nn.ModuleDict({"a": block("llama4"), "b": block("longcat_flash"), "c": block("switch_transformers")})
    report = prepare(model)
    assert [s.name for s in report.rewritten] == ["a", "b.experts", "c"]
    assert (report.found, report.ignored, report.notes) == (3, [], [])
    assert lookalikes(model) == []
    text = str(report)
    assert "3 are rewritten" in text and "LongcatFlashExperts" in text and "free_unused=True" in text
    assert report.to_dict()["rewritten"][0]["kind"] == "Llama4TextMoe"
    assert prepare(model).to_dict() == report.to_dict()


def test_an_unprepared_model_is_told_what_would_help() -> None:
    (only,) = lookalikes(nn.ModuleList([block("llama4")]))
    assert only.name == "0" and "moec.prepare(model) rewrites it" in only.reason


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
@torch.no_grad()
def test_a_copy_of_a_prepared_model_works_and_can_be_prepared(family: str, copied: Any) -> None:
    own = block(family)
    want = first(own(tokens()))
    prepare(own)
    other = copied(own)
    torch.testing.assert_close(first(other(tokens())), want)
    report = prepare(other)
    assert len(report.rewritten) == 1
    torch.testing.assert_close(first(other(tokens())), want)
    report.undo()
    assert not any(is_rewritten(m) for m in other.modules())
    assert any(is_rewritten(m) for m in own.modules())


# --- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("switch_transformers", {"router_jitter_noise": 0.1}, "jitter"),
        ("switch_transformers", {"dropout_rate": 0.5}, "dropout"),
        ("nllb_moe", {"moe_token_dropout": 0.5}, "dropout"),
        ("nllb_moe", {"activation_dropout": 0.5}, "dropout"),
    ],
)
@torch.no_grad()
def test_random_numbers_while_training_are_those_of_the_own_forward(
    family: str, options: dict[str, float], why: str
) -> None:
    own = block(family, **options)
    rewritten = copy.deepcopy(own)
    (site,) = prepare(rewritten).rewritten
    assert why in site.note and "its own forward runs" in site.note
    torch.testing.assert_close(first(rewritten(tokens())), first(own(tokens())))
    results = []
    for module in (own.train(), rewritten.train()):
        torch.manual_seed(0)
        results.append(first(module(tokens())))
    assert torch.equal(*results)


@torch.no_grad()
def test_a_router_that_draws_numbers_stays_the_models_own() -> None:
    own = block("dbrx").train()
    own.router.moe_jitter_eps = 0.5
    rewritten = copy.deepcopy(own)
    assert prepare(rewritten).rewritten
    results = []
    for module in (own, rewritten):
        torch.manual_seed(0)
        results.append(first(module(tokens())))
    torch.testing.assert_close(*results)
    torch.manual_seed(1)
    assert not torch.allclose(first(own(tokens())), results[0])


# --- weights that are never read -------------------------------------------------------------------------------------


@torch.no_grad()
def test_unread_weights_can_be_freed() -> None:
    module = block("longcat_flash")
    full = {k: v.clone() for k, v in module.state_dict().items()}
    want = module(tokens())
    weight = module.experts.gate_up_proj
    row = 2 * INNER * HIDDEN * 4
    assert weight.untyped_storage().nbytes() == (EXPERTS + ZERO_EXPERTS) * row

    (site,) = prepare(module, free_unused=True).rewritten
    assert site.freed == ZERO_EXPERTS * row
    assert module.experts.gate_up_proj is weight
    assert weight.untyped_storage().nbytes() == EXPERTS * row
    torch.testing.assert_close(module(tokens()), want)

    assert list(module.state_dict()) == list(full)
    weight.zero_()
    module.load_state_dict(full)  # a checkpoint of the full shape
    torch.testing.assert_close(module(tokens()), want)
    module.load_state_dict(module.state_dict())
    module.load_state_dict(full, assign=True)
    assert module.experts.gate_up_proj.untyped_storage().nbytes() == EXPERTS * row
    torch.testing.assert_close(module(tokens()), want)
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({**full, "experts.gate_up_proj": full["experts.gate_up_proj"][:2]})

    again = prepare(module)
    assert again.rewritten[0].freed == 0 and "never read" not in again.rewritten[0].note
    again.undo()
    torch.testing.assert_close(module(tokens()), want)  # its own forward never reads them


@torch.no_grad()
def test_unread_weights_stay_unless_asked() -> None:
    module = block("longcat_flash")
    (site,) = prepare(module).rewritten
    assert site.freed == 0
    assert module.experts.gate_up_proj.shape[0] == EXPERTS + ZERO_EXPERTS


def test_training_goes_on_after_freeing() -> None:
    module = block("longcat_flash")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    prepare(module, free_unused=True)
    before = module.experts.gate_up_proj.detach().clone()
    first(module(tokens())).square().sum().backward()
    optimizer.step()
    assert not torch.equal(module.experts.gate_up_proj, before)


# --- reports of the compiler ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_explain_misses_nothing_and_names_what_is_declined() -> None:
    from transformers.models.doge import modeling_doge as doge

    config = doge.DogeConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_experts=16, num_experts_per_tok=2)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = block("dbrx"), doge.DogeCDMoE(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))[0]

    model = Two()
    prepare(model)
    report = moec.explain(model, (tokens(),), backends=["aten"])
    assert {b.name: b.fused for b in report.layers} == {"one": True, "two": False}
    assert "product keys" in str(report.layers[1].reason)


@torch.no_grad()
def test_explain_says_so_where_the_own_forward_ran() -> None:
    module = nn.Sequential(block("switch_transformers", dropout_rate=0.5)).train()
    prepare(module)
    report = moec.explain(module, (tokens(),), backends=["aten"])
    (only,) = report.layers
    assert not only.fused and "own forward runs: dropout" in str(only.reason)


class Layer(nn.Module):
    def __init__(self, family: str, seed: int) -> None:
        super().__init__()
        self.mlp = block(family, seed=seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(first(self.mlp(x)).view(x.shape))  # numbers stay small over the depth


class Stack(nn.Module):
    def __init__(self, family: str, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(family, seed) for seed in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("family", ["dbrx", "llama4"])
@torch.no_grad()
def test_layers_that_are_alike_share_a_region(family: str) -> None:
    model = Stack(family, 4)
    want = model(tokens())
    report = prepare(model)
    assert [len(group.layers) for group in report.regions] == [4]
    with moec.recording() as compiled:
        got = moec_compile(model)(tokens())
    assert [(b.fused, b.instances) for b in compiled.layers] == [(True, 4)]
    torch.testing.assert_close(got, want)


def test_a_layer_that_was_left_alone_shares_none() -> None:
    model = Stack("dbrx", 5)
    model.layers[2].mlp.experts.mlp.register_forward_hook(lambda m, args, out: out * 2)
    report = prepare(model)
    assert [group.layers for group in report.regions] == [tuple(f"layers.{i}" for i in (0, 1, 3, 4))]
    assert len(report.ignored) == 1


def test_every_rewriter_is_tried_here() -> None:
    tried = {type(m).__name__ for f in FAMILIES for m in block(f).modules()} | {"JetMoeMoA"}
    tried |= {"FP8Experts", "FP8Linear"}  # tests/prepare/test_fp8_experts.py, test_fp8_linear.py
    assert {t.rpartition(".")[2] for t in REWRITERS if t.startswith("transformers.")} <= tried


def test_a_fingerprint_is_of_the_code_alone() -> None:
    plain = "def f(x):\n    return x + 1\n"
    assert digest(plain) == digest('def f(x):\n    """Says more."""\n\n    # and more\n    return x + 1\n')
    assert digest(plain) != digest(plain.replace("1", "2"))
    assert digest("@g\n" + plain) != digest(plain)


@torch.no_grad()
def test_a_whole_model_with_experts_in_its_attention() -> None:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": INNER, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = JetMoeForCausalLM(JetMoeConfig(**sizes, **heads, use_cache=False)).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    ids = torch.arange(3, 13).view(2, 5)
    want = model(ids, output_router_logits=True)
    report = prepare(model)
    assert [s.kind for s in report.rewritten] == ["JetMoeMoA", "JetMoeMoE"] * 2 or len(report.rewritten) == 4
    assert "attention lies between" in str(report)
    eager = model(ids, output_router_logits=True)
    torch.testing.assert_close(eager.logits, want.logits)
    for got, expected in zip(eager.router_logits, want.router_logits, strict=True):
        torch.testing.assert_close(got, expected)
    with moec.recording() as compiled, pytest.warns(moec.MoecWarning, match="without a second one"):
        got = moec_compile(model)(ids).logits
    torch.testing.assert_close(got, want.logits, rtol=1e-5, atol=1e-5)
    assert compiled.graphs == 1
    assert {b.name.rpartition(".")[2]: b.fused for b in compiled.layers} == {"mlp": True, "self_attention": False}
