"""A causal language model as two functions for generating: prefill and decode, with the cache as tensors of the caller.

The cache is static: keys and values ``[1, heads, length, width]`` of every layer, filled from the front. Both functions
write the new tokens' keys and values into it and return the logits of the last token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moec.aot.dynamic import Ranges
from moec.aot.errors import AotError
from moec.aot.source import Source, Tokens, exported

PREFILL, DECODE = "prefill", "decode"


class Cached(nn.Module):
    """Tokens after what the cache holds, to logits of the last one.

    Args:
        model: A causal language model of transformers.
        length: Tokens that the cache holds.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model = model
        self.length = length
        names = inspect.signature(model.forward).parameters
        self.argument = "cache" if "cache" in names else "past_key_values"

    def forward(self, input_ids: Tensor, position: Tensor, caches: list[Tensor]) -> Tensor:
        """One call.

        Args:
            input_ids: i64 [1, tokens].
            position: i64 [], how many tokens the cache holds already.
            caches: Keys and values of every layer, written in place.

        Returns:
            Logits [1, 1, vocabulary].
        """
        from transformers.cache_utils import Cache, StaticLayer

        layers = []
        for keys, values in zip(caches[::2], caches[1::2], strict=True):
            layer: Any = StaticLayer(self.length)
            layer.keys, layer.values, layer.device = keys, values, keys.device
            layer.cumulative_length = position.clone()
            layer.is_initialized = True
            layers.append(layer)
        given = {self.argument: Cache(layers=layers)}
        logits: Tensor = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **given).logits
        return logits


def cache_shapes(model: nn.Module, input_ids: Tensor) -> list[tuple[int, int]]:
    """Heads and width of the keys and values of every layer: those of a short run on shapes alone.

    Raises:
        AotError: The model keeps no cache of keys and values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            made = model(input_ids=mode.from_tensor(input_ids), use_cache=True)
            cache = getattr(made, "cache", None)
            layers = (cache if cache is not None else made.past_key_values).layers
            return [(t.shape[1], t.shape[3]) for layer in layers for t in (layer.keys, layer.values)]
        except (AttributeError, TypeError, IndexError) as error:
            raise AotError(
                f"--generate needs a cache of keys and values in every layer, which this model does not keep: {error}",
                hint="compile it without --generate",
            ) from error


def export_pair(source: Source, ranges: Ranges) -> tuple[dict[str, ExportedProgram], int]:
    """Prefill and decode of a source that takes tokens, and the length of their cache.

    Raises:
        AotError: The source takes no tokens, or cannot be exported.
    """
    wrapped = source.module
    if not isinstance(wrapped, Tokens):
        raise AotError("--generate is for causal language models of transformers", hint="give a Hugging Face folder")
    if len(ranges) != 2:
        raise AotError("--generate takes --dynamic batch=1,seq=1..LENGTH", hint="LENGTH tokens fit into the cache")
    length = list(ranges.values())[1][1]
    model = wrapped.model
    shapes = cache_shapes(model, source.args[0][:1, :2])
    dtype = next(model.parameters()).dtype
    module = Cached(model, length).eval()
    programs = {}
    for name, count in ((PREFILL, 3), (DECODE, 1)):
        ids = source.args[0][:1, :1].expand(1, count).contiguous()
        caches = [torch.zeros(1, heads, length, width, dtype=dtype) for heads, width in shapes]
        dynamic = {
            "input_ids": {1: Dim("seq", min=1, max=length)} if count > 1 else None,
            "position": None,
            "caches": [None] * len(caches),
        }
        programs[name] = exported(module, source.text, (ids, torch.tensor(0), caches), {}, dynamic)
    return programs, length


def end_tokens(module: nn.Module | None) -> tuple[int, ...]:
    """Tokens after which a model stops."""
    model = getattr(module, "model", None)
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()


def generation_facts(source: Source, length: int) -> Mapping[str, tuple[int, ...]]:
    """What the manifest says about generating."""
    return {"cache": (length,), "end": end_tokens(source.module)}
