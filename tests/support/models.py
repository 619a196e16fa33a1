"""Small random Hugging Face MoE models, one per family that moec promises to know.

Widths are tiny, structure is not: grouped queries, a shared expert, expert groups, a correction bias, sinks and biases
are all there and all non-zero, because a term that is zero cannot be seen missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from moec.ir.errors import nearest

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

VOCAB = 128
FIRST_PLAIN_TOKEN = 3  # 0, 1 and 2 are padding, beginning and end of sequence
WEIGHT_STD = 0.08
BIAS_STD = 0.05

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,  # pass use_cache=True to generate()
}
_EIGHT_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
_EIGHT_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}
_GROUPED_SIGMOID: dict[str, Any] = {
    "moe_intermediate_size": 48,
    "intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


SHARED_EXPERTS = {"deepseek_v3": "shared_experts", "glm4_moe": "shared_experts", "qwen3_next": "shared_expert"}
"""The families whose blocks have a shared expert, and what the block calls it."""


@dataclass(frozen=True)
class Family:
    """A model family: its transformers config class, and what makes that config small.

    ``layer_types`` repeats over the depth, for families that mix kinds of layers.
    """

    config_class: str
    sizes: dict[str, Any] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {
            **_EIGHT_EXPERTS,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "decoder_sparse_step": 1,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": Family("MixtralConfig", _EIGHT_LOCAL_EXPERTS),
    "olmoe": Family("OlmoeConfig", {**_EIGHT_EXPERTS, "intermediate_size": 48}),
    "deepseek_v3": Family("DeepseekV3Config", {**_GROUPED_SIGMOID, **_LATENT_ATTENTION}),
    "gpt_oss": Family("GptOssConfig", {**_EIGHT_LOCAL_EXPERTS, "head_dim": 16, "sliding_window": 8}),
    "granitemoe": Family("GraniteMoeConfig", _EIGHT_LOCAL_EXPERTS),
    "glm4_moe": Family("Glm4MoeConfig", {**_GROUPED_SIGMOID, "head_dim": 16}),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {
            **_EIGHT_EXPERTS,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 1,
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        layer_types=("linear_attention", "full_attention"),
    ),
}


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    implementation: str | None = None,
    train: bool = False,
    layers: int = 2,
    seed: int = 0,
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """A small random causal language model of one family, the same for the same arguments.

    Args:
        name: A key of ``FAMILIES``.
        dtype: Type of all parameters (router correction biases stay as the family has them).
        implementation: transformers' experts implementation; None keeps the family's default.
        train: Leave the model in training mode.
        layers: Number of decoder layers.
        seed: Seed of the weights. The global random state is left alone.
        overrides: Further config attributes, e.g. ``num_experts=128``.

    Raises:
        KeyError: For an unknown family or an attribute that the family's config does not have.
    """
    if name not in FAMILIES:
        raise KeyError(f"unknown family {name!r}: {nearest(name, FAMILIES)}")
    family = FAMILIES[name]
    sizes = {**_COMMON, **family.sizes, "num_hidden_layers": layers}
    if family.layer_types:
        sizes["layer_types"] = [family.layer_types[i % len(family.layer_types)] for i in range(layers)]
    config_class = getattr(transformers, family.config_class)
    known = set(vars(config_class())) | set(config_class.attribute_map)
    for key in overrides:
        if key not in known:
            raise KeyError(f"{family.config_class} has no attribute {key!r}: {nearest(key, known)}")
    config = config_class(**{**sizes, **overrides})
    if implementation is not None:
        config._experts_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for what _randomise leaves alone, such as Qwen3-Next's decay rates
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        _randomise(model, seed)
    model.train(train)
    return model


def inputs(name: str, batch: int, seq: int, *, seed: int = 0, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    """Keyword arguments for ``build(name)``: ``input_ids`` ``[batch, seq]`` of plain tokens, seeded."""
    if name not in FAMILIES:
        raise KeyError(f"unknown family {name!r}: {nearest(name, FAMILIES)}")
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(FIRST_PLAIN_TOKEN, vocab, (batch, seq), generator=generator)}


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill matrices, biases and sinks with noise: some families start them (and their routers) at zero."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fill(parameter, WEIGHT_STD)
        elif parameter_name.endswith(("bias", "sinks")):
            fill(parameter, BIAS_STD)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            fill(buffer, BIAS_STD)
