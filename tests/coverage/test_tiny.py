"""Small models of real families: they keep the family's structure, hold MoE blocks, and route."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest
import torch
import transformers

from moec.coverage.families import Family, discover
from moec.coverage.shrink import EXPERTS, HIDDEN, INNER, MAX_LAYERS, VOCAB, capped, shrink
from moec.coverage.tiny import BATCH, LENGTH, MAX_PARAMETERS, NoExpertsError, block_paths, build


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    return {f.name: f for f in discover()}


@pytest.mark.parametrize(
    ("name", "value", "small"),
    [
        ("hidden_size", 4096, HIDDEN),
        ("hidden_size", 32, None),
        ("num_local_experts", 256, EXPERTS),
        ("moe_intermediate_size", [1536, 512], [INNER, INNER]),
        ("attention_dropout", 0.1, 0.0),
        ("n_group", 8, 4),
        ("n_group", 1, None),
        ("n_group", None, None),
        ("first_k_dense_replace", 0, None),
        ("use_mamba_kernels", True, False),
        ("tie_word_embeddings", True, None),
        ("hidden_act", "silu", None),
        ("routed_scaling_factor", 2.5, None),
        ("image_token_id", 200000, VOCAB - 1),
    ],
)
def test_what_a_name_means(name: str, value: object, small: object) -> None:
    made = capped(name, value)
    assert made == small or (small is None and made == value)
    assert type(made) in (type(small), type(value))


@dataclasses.dataclass
class Mixed:
    """A configuration of a family that nobody has seen: three kinds of layers, and a list of layer numbers."""

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    moe_layers: list[int] | None = None
    special: int = 7

    def __post_init__(self) -> None:
        depth = self.num_hidden_layers
        if self.layer_types is None:
            self.layer_types = ["full" if i % 4 == 3 else "linear" for i in range(depth)]
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["dense"] + ["sparse"] * (depth - 1)
        if self.moe_layers is None:
            self.moe_layers = list(range(depth))


def test_one_layer_of_every_kind() -> None:
    small = shrink(Mixed)
    assert small.layer_types == ["linear", "linear", "full"]
    assert small.mlp_layer_types == ["dense", "sparse", "sparse"]
    assert small.num_hidden_layers == 3 <= MAX_LAYERS
    assert small.moe_layers == [0, 1, 2]


def test_equal_sizes_stay_equal_and_the_unknown_stays() -> None:
    small = shrink(Mixed)
    assert small.num_key_value_heads == small.num_attention_heads == 4
    assert (small.hidden_size, small.special) == (HIDDEN, 7)
    assert shrink(Mixed, {"special": 3, "num_attention_heads": 2}).special == 3


def test_dense_layers_first_leave_two_blocks() -> None:
    config = shrink(transformers.DeepseekV3Config)
    assert (config.first_k_dense_replace, config.num_hidden_layers) == (1, 3)
    assert (config.n_group, config.topk_group, config.n_routed_experts) == (4, 2, EXPERTS)


def test_nested_configurations_are_shrunk_too() -> None:
    config = shrink(transformers.DbrxConfig, {"ffn_config": {"moe_top_k": 2}})
    assert config.ffn_config.hidden_size == config.d_model == HIDDEN
    assert config.ffn_config.moe_top_k == 2


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "jetmoe", "switch_transformers", "qwen3_next"])
def test_small_models_route(name: str) -> None:
    tiny = build(families()[name])
    assert len(tiny.blocks()) >= 2
    assert tiny.parameters < MAX_PARAMETERS
    inputs = tiny.inputs(0)
    assert inputs["input_ids"].shape == (BATCH, LENGTH)
    with torch.no_grad():
        first, again = tiny.model(**inputs).logits, build(families()[name]).model(**inputs).logits
        other = tiny.model(**tiny.inputs(1)).logits
    assert first.isfinite().all()
    assert torch.equal(first, again), "the weights are the same every time"
    assert not torch.equal(first, other)


def test_every_expert_may_be_chosen() -> None:
    tiny = build(families()["mixtral"])
    used: set[int] = set()
    router = next(m for m in tiny.model.modules() if type(m).__name__ == "MixtralTopKRouter")
    router.register_forward_hook(lambda _m, _a, out: used.update(out[-1].flatten().tolist()))
    with torch.no_grad():
        tiny.model(**tiny.inputs(0))
    assert len(used) >= EXPERTS - 1


def test_two_gemms_of_one_owner_are_one_block() -> None:
    class Part(torch.nn.Module):
        pass

    owner = torch.nn.ModuleDict({"up": Part(), "down": Part(), "norm": torch.nn.Identity()})
    model = torch.nn.ModuleDict({"a": owner, "b": torch.nn.ModuleDict({"experts": Part()})})
    assert block_paths(model, frozenset({"Part"})) == ["a", "b.experts"]
    assert block_paths(model, frozenset()) == []


def test_experts_within_experts_are_one_block() -> None:
    class Inner(torch.nn.Module):
        pass

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Inner(), Inner()

    model = torch.nn.ModuleDict({"ffn": torch.nn.ModuleDict({"experts": Outer()})})
    assert block_paths(model, frozenset({"Inner", "Outer"})) == ["ffn.experts"]


def test_a_family_whose_configuration_leaves_experts_out() -> None:
    plain = families()["gemma4"]
    with pytest.raises(NoExpertsError, match="has no experts"):
        build(dataclasses.replace(plain, name="gemma4 without a line of its own"))
