"""Small models whose experts are in fp8 as transformers holds those of a quantized checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from tests.backends.fp8 import fp8_weight

SIZES = {
    "vocab_size": 64, "hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2, "use_cache": False,
    "intermediate_size": 48, "moe_intermediate_size": 128, "first_k_dense_replace": 1, "num_key_value_heads": 2,
    "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip


def deepseek(scale_fmt: str = "float", **sizes: Any) -> DeepseekV3ForCausalLM:
    """DeepSeek-V3 in bf16, its experts in fp8 with a scale for 128 x 128 elements.

    Args:
        scale_fmt: ``float``, or ``ue8m0`` for scales that are powers of two, a byte each.
        sizes: Of the config.
    """
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | sizes)).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so that experts say something beside the residual
                parameter.mul_(4)
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wide = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    config = FineGrainedFP8Config(weight_block_size=(128, 128), scale_fmt=scale_fmt)
    replace_with_fp8_linear(model, modules_to_not_convert=others, quantization_config=config)
    for name, before in wide.items():
        fill(model.get_submodule(name), before.gate_up_proj, before.down_proj)
    return model


def fill(module: nn.Module, up: torch.Tensor, down: torch.Tensor) -> None:
    """Give an ``FP8Experts``, which is on the meta device, the weights ``[E, 2I, H]`` and ``[E, H, I]``."""
    for name, weight in (("gate_up_proj", up), ("down_proj", down)):
        values, scales = fp8_weight(weight.detach().float())
        kind = getattr(module, f"{name}_scale_inv").dtype
        if kind != torch.float32:
            scales = torch.exp2(scales.log2().ceil())
        setattr(module, name, nn.Parameter(values))  # transformers has them ask for gradients, and gives none
        setattr(module, f"{name}_scale_inv", nn.Parameter(scales.to(kind), requires_grad=False))
