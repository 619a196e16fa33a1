"""Tiny random blocks of the families that do not follow transformers' experts interface."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

HIDDEN = 16
INNER = 12
EXPERTS = 5
WEIGHT_STD = 0.3
FAVOURITE = 3
"""The expert that all tokens choose first in a skewed block."""
_STEERING = 0
"""The feature of a token that decides in a skewed block; tokens have 4.0 there."""


@dataclass(frozen=True)
class Family:
    """One family's MoE block.

    Attributes:
        module: The modeling file's folder.
        block: Class of the block, router included.
        config: Class of the config.
        sizes: Config attributes.
        router: Path of the router's weight ``[E, H]``.
        fused: Path of the module whose experts are fused.
        extra: Further arguments of the block's class.
    """

    module: str
    block: str
    config: str
    sizes: dict[str, Any]
    router: str
    fused: str = ""
    extra: tuple[Any, ...] = ()


FAMILIES = {
    "llama4": Family(
        "llama4",
        "Llama4TextMoe",
        "Llama4TextConfig",
        {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        "router.weight",
    ),
    "llama4 top-1": Family(
        "llama4",
        "Llama4TextMoe",
        "Llama4TextConfig",
        {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS, "num_experts_per_tok": 1},
        "router.weight",
    ),
    "longcat_flash": Family(
        "longcat_flash",
        "LongcatFlashMoE",
        "LongcatFlashConfig",
        {
            "hidden_size": HIDDEN,
            "expert_ffn_hidden_size": INNER,
            "n_routed_experts": EXPERTS,
            "zero_expert_num": 3,
            "moe_topk": 3,
            "routed_scaling_factor": 1.5,
        },
        "router.classifier.weight",
        fused="experts",
    ),
    "dbrx": Family(
        "dbrx",
        "DbrxFFN",
        "DbrxConfig",
        {
            "d_model": HIDDEN,
            "ffn_config": {
                "hidden_size": HIDDEN,
                "ffn_hidden_size": INNER,
                "moe_num_experts": EXPERTS,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": 2.0,
            },
        },
        "router.layer.weight",
        fused="experts",
    ),
    "jetmoe": Family(
        "jetmoe",
        "JetMoeMoE",
        "JetMoeConfig",
        {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        "router.layer.weight",
    ),
    "switch_transformers": Family(
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        "SwitchTransformersConfig",
        {"d_model": HIDDEN, "d_ff": INNER, "num_experts": EXPERTS, "expert_capacity": 2, "router_jitter_noise": 0.0}
        | {"dropout_rate": 0.0},
        "router.classifier.weight",
    ),
    "nllb_moe": Family(
        "nllb_moe",
        "NllbMoeSparseMLP",
        "NllbMoeConfig",
        {"d_model": HIDDEN, "num_experts": EXPERTS, "moe_token_dropout": 0.0, "expert_capacity": 3}
        | {"moe_eval_capacity_token_fraction": -1.0, "batch_prioritized_routing": True},
        "router.classifier.weight",
        extra=(INNER,),
    ),
    "step3p7": Family(
        "step3p7",
        "Step3p7SparseMoeBlock",
        "Step3p7TextConfig",
        {
            "hidden_size": HIDDEN,
            "moe_intermediate_size": INNER,
            "share_expert_dim": INNER,
            "n_routed_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "swiglu_limits": [0.4],
            "num_hidden_layers": 1,
        },
        "gate.weight",
        fused="experts",
        extra=(0,),
    ),
}


def modeling(family: str) -> Any:
    """The modeling module of a family."""
    name = FAMILIES[family].module
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def block(family: str, *, skewed: bool = False, seed: int = 0, **overrides: Any) -> Any:
    """A block with random weights and buffers, in eval mode.

    Args:
        family: A key of ``FAMILIES``.
        skewed: All tokens choose expert ``FAVOURITE`` first.
        seed: Of the weights.
        overrides: Config attributes.
    """
    made = FAMILIES[family]
    config = getattr(modeling(family), made.config)(**{**made.sizes, **overrides})
    module: nn.Module = getattr(modeling(family), made.block)(config, *made.extra)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * WEIGHT_STD)
        if skewed:
            router = module.get_parameter(made.router)
            router[:, _STEERING] = 0.0
            router[FAVOURITE, _STEERING] = 10.0
    return module.eval()


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """``[batch, length, HIDDEN]``"""
    x = torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed))
    x[..., _STEERING] = 4.0
    return x


def first(result: Any) -> torch.Tensor:
    """The block's output, without the logits that some return beside it; ``[T, H]``."""
    out = result[0] if isinstance(result, tuple) else result
    return out.reshape(-1, HIDDEN)
