"""A model for ``moec explain examples.factory:olmoe``: a factory returns the module and what to call it with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM


def olmoe() -> tuple[torch.nn.Module, tuple[()], dict[str, Any]]:
    """A small OLMoE with random weights, and one sequence of 16 tokens."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return OlmoeForCausalLM(config), (), {"input_ids": torch.arange(16)[None], "use_cache": False}
