"""A family's own configuration, made small: every size is capped by what its name means.

Sizes are only ever lowered, and what a family leaves out (None, 0, False) stays out: the small model keeps the
structure of the published one. The depth is cut to one layer of every kind that the family mixes.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = 64
INNER = 48
HEADS = 4
HEAD_DIM = 16
EXPERTS = 8
VOCAB = 128
MAX_LAYERS = 4

# The first pattern that matches a field's whole name caps it. An int caps ints; 0.0 switches floats off.
_CAPS: tuple[tuple[re.Pattern[str], int | float], ...] = tuple(
    (re.compile(pattern), cap)
    for pattern, cap in (
        # what would make two runs differ, and fused kernels that need a GPU
        (r".*(dropout|layerdrop|jitter|pdrop).*", 0.0),
        (r"use_mamba_kernels", 0),
        # layers beside the decoder's own
        (r"num_(mtp|nextn_predict|kv_shared)_layers", 0),
        # depth
        (r"num_sparse_(encoder|decoder)_layers|first_k_dense_replace|num_dense_layers|.*_layer_start_index", 1),
        (r".*(_period|_interval|sparse_step|_every_n_layers|_per_attn_res_block|group_size)", 2),
        (r".*_layer_offset", 1),
        (r"num_hidden_layers|(num_|n_|encoder_|decoder_|num_encoder_|num_decoder_)layers", 2),
        # tokens
        (r".*vocab_size.*", VOCAB),
        (r"pad_token_id", 0),
        (r"bos_token_id|decoder_start_token_id", 1),
        (r"eos_token_id", 2),
        (r".*_token_(id|index)", VOCAB - 1),
        (r"max_.*(positions|position_embeddings|seq_len|length)", 512),
        # experts and routing
        (r".*(n|num)_shared_experts", 1),
        (r"zero_expert_num", 4),
        (r".*(num|n)_(local_|routed_)?experts", EXPERTS),
        (r"n_group|num_expert_group", 4),
        (r"topk_group", 2),
        (r"index_topk_blocks", 4),
        (r"index_topk", VOCAB),
        (r".*experts_per_tok(en)?|moe_(k|topk|top_k)|top_k_experts", 2),
        # widths
        (r".*(intermediate_size|ffn_hidden_size|ffn_dim|d_ff|share_expert_dim).*", INNER),
        (r"hidden_size|d_model|n_embd", HIDDEN),
        (r".*hidden_size.*|moe_latent_size", HIDDEN // 2),
        (r".*(_rank|lowrank)", 16),
        # heads; a mamba layer's heads times their width is twice the hidden size
        (r"mamba_(num|n)_heads", 2 * HIDDEN // HEAD_DIM),
        (r".*(key_heads|kv_heads|kv_n_heads|key_value_heads)", HEADS // 2),
        (r".*heads", HEADS),
        (r"qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
        (r".*(head_dim|d_kv|kv_channels|d_head)", HEAD_DIM),
        (r".*groups", 2),
        # windows, chunks, states: short enough that a few tokens cross them
        (r"(.*_)?(sliding_window|sliding_window_size|chunk_size|block_size)", 8),
        (r".*(d_state|state_size)", 8),
        (r"rel_extent", 16),
    )
)


def shrink(config_class: type[Any], extra: Mapping[str, Any] | None = None) -> Any:
    """A small configuration of a class.

    Args:
        config_class: A transformers configuration class whose defaults make a model.
        extra: Values that win over the rules, by field; a mapping reaches into a nested configuration.

    Returns:
        An instance.

    Raises:
        Exception: Whatever the class raises on values that don't fit together.
    """
    extra = dict(extra or {})
    whole = config_class()
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        current = vars(whole).get(field.name)  # a plain read: some fields refuse others, as layers differ in them
        if dataclasses.is_dataclass(current):
            inner = extra.pop(field.name, {})
            values[field.name] = shrink(type(current), inner)
        elif (small := capped(field.name, field.default)) is not None and small != field.default:
            values[field.name] = small
    _keep_equal(whole, values)
    values |= _depth(whole, {f.name for f in dataclasses.fields(config_class)})
    return config_class(**{**values, **extra})


def capped(name: str, value: Any) -> Any:
    """The value that a field gets; None where nothing is known about it, or it is off already.

    Lists of numbers are capped one by one; strings stay.
    """
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        made = [capped(name, v) for v in value]
        return None if None in made else type(value)(made)
    if not isinstance(value, int | float):
        return None
    for pattern, cap in _CAPS:
        if pattern.fullmatch(name):
            if isinstance(value, bool):
                return bool(cap) and value
            if isinstance(value, float) != isinstance(cap, float):
                return 0.0 if cap == 0.0 else None  # a chance given as 0 or 1 is a float too
            return min(value, cap)
    return None


def _keep_equal(whole: Any, values: dict[str, Any]) -> None:
    """Sizes that the family has equal stay equal: as many key heads as heads, a head as wide as its rotary part."""
    for one, other in (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim")):
        same = vars(whole).get(one) == vars(whole).get(other)
        if same and one in values and other in values:
            values[one] = values[other]


def _depth(whole: Any, known: set[str]) -> dict[str, Any]:
    """One layer of every kind, in the family's order; lists that say something of every layer are cut alike."""
    depth = getattr(whole, "num_hidden_layers", None)
    lists = {
        name: list(value)
        for name in known
        if isinstance(value := vars(whole).get(name), list | tuple) and len(value) == depth and not _rising(value)
    }
    dense_first = any(vars(whole).get(n) for n in ("first_k_dense_replace", "num_dense_layers"))
    kinds = [repr(kind) for kind in zip(*(lists[name] for name in sorted(lists)), strict=True)]
    first = sorted({kind: kinds.index(kind) for kind in kinds}.values())[:MAX_LAYERS]
    if len(first) == 1 or not lists:
        # two of one kind, so that two blocks are seen; with dense layers first, three in all
        count = 3 if dense_first and not lists else 2
        made: dict[str, Any] = {name: values[:1] * count for name, values in lists.items()}
    else:
        count = len(first)
        made = {name: [values[i] for i in first] for name, values in lists.items()}
    for name in ("num_hidden_layers", "num_layers", "n_layers", "encoder_layers", "decoder_layers"):
        if name in known:
            made[name] = count
    return made


def _rising(values: Any) -> bool:
    """Numbers of layers rather than something about each: 1, 3, 5."""
    return all(type(v) is int for v in values) and all(a < b for a, b in itertools.pairwise(values))
