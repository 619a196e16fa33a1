"""The demo's model: two layers shaped like Qwen3-30B-A3B's, with made-up weights in bf16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moec.ir.errors import MoecError
from moec.random_weights import random_transformer


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo's model (widths in elements) and the length of its prefill."""

    label: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tokens: int
    layers: int = 2


#: Qwen3-30B-A3B's own layer sizes (its config.json); it has 48 such layers.
FULL = Shape("Qwen3-30B-A3B-shaped", 2048, 768, 128, 8, 32, 4, 128, 151936, 512)
SMALL = Shape("narrow Qwen3-MoE", 256, 96, 16, 4, 8, 2, 32, 4096, 256)


def build(shape: Shape, progress: Callable[[str, int], None] | None = None) -> Any:
    """The model, in eval mode, without gradients.

    Raises:
        MoecError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as e:
        raise MoecError("the demo needs transformers", hint="pip install 'moec[hf]'") from e
    transformers.logging.set_verbosity_error()
    make_config: Any = transformers.Qwen3MoeConfig  # its fields are not known to type checkers
    config = make_config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = random_transformer(transformers.AutoModelForCausalLM, config, torch.bfloat16, progress)
    return model.eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """A second model object on the very same weights: preparing one for a compiler leaves the other as it was."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
