"""What the general rules cannot know about a family: one line each.

Most lines switch an MoE on that the family's default configuration leaves off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moec.coverage.shrink import EXPERTS, HEAD_DIM, HEADS, INNER


@dataclass(frozen=True)
class Override:
    """One family's exceptions.

    Attributes:
        config: Values of configuration fields, over the general rules.
        entry: Model class to build instead of the best-named one.
        images: The model takes pixels, not tokens.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    entry: str | None = None
    images: bool = False


_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}  # sections fill half a head

_ROUTES = {"num_experts_per_tok": 2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
_SLIDING = {  # dots3_note's layers with a window have sizes of their own, given to its constructor only
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": HEAD_DIM,
    "swa_kv_lora_rank": HEAD_DIM,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": HEAD_DIM,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

OVERRIDES: dict[str, Override] = {
    "cohere2_moe": Override({"num_shared_experts": 1}),
    "dbrx": Override(
        {
            "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        }
    ),
    "deepseek_ocr2": Override({**_ROUTES, "mlp_layer_types": ["dense", "sparse"]}),
    "deepseek_v2": Override(_ROUTES),
    "deepseek_v4": Override({"head_dim": 64}),  # an eighth of it is rotary
    "diffusion_gemma": Override(
        {
            "num_experts": EXPERTS,
            "top_k_experts": 2,
            "moe_intermediate_size": INNER,
            "global_head_dim": HEAD_DIM,
        }
    ),
    "doge": Override({"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}),
    "dots1": Override({"num_experts_per_tok": 2, "n_routed_experts": EXPERTS, "n_shared_experts": 1}),
    "dots3_note": Override(_SLIDING),
    "ernie4_5_vl_moe": Override(
        {"moe_intermediate_size": [INNER, INNER], "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}
    ),
    "flint": Override({"mlp_only_layers": [0]}),
    "gemma4": Override(
        {
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": 2,
            "moe_intermediate_size": INNER,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": HEAD_DIM,
        }
    ),
    "glm4v_moe": Override({"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}),
    "granitemoehybrid": Override({"layer_types": ["mamba", "attention"]}),
    "granitemoeshared": Override({"shared_intermediate_size": INNER}),
    "hunyuan_v1_moe": Override({"num_experts": EXPERTS, "moe_topk": 2, "head_dim": HEAD_DIM}),
    "hy_v4_vl": Override({"rope_parameters": {**_ROPE, "mrope_section": [1, 2, 1]}}),
    "lfm2_moe": Override({"layer_types": ["conv", "conv", "full_attention"]}),
    "longcat_flash": Override({"moe_topk": 3}),  # of real and zero experts together
    "qwen4_exp": Override(_INDEXER),
    "step3p7": Override({"sliding_window": 8}),
    "vitpose_backbone": Override(
        {"num_experts": 4, "part_features": 16, "image_size": [32, 48]}, entry="VitPoseBackbone", images=True
    ),
}


def override(family: str) -> Override:
    """The exceptions of a family; most have none."""
    return OVERRIDES.get(family, Override())
