"""A causal language model as two functions for generating: prefill and decode, with the cache as tensors of the caller.

The cache is static: keys and values ``[batch, heads, length, width]`` of every layer, filled from the front. Both
functions write the new tokens' keys and values into it and return the logits of the last token. Prompts of different
lengths lie side by side with padding before the shorter ones, as transformers' ``generate`` takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moec.aot.dynamic import Ranges, example_size
from moec.aot.errors import AotError
from moec.aot.source import Source, Tokens, exported

PREFILL, DECODE = "prefill", "decode"
_ROWS = 2  # to trace with


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

    def forward(
        self, input_ids: Tensor, position: Tensor, caches: list[Tensor], padding: Tensor | None = None
    ) -> Tensor:
        """One call.

        Args:
            input_ids: i64 [batch, tokens].
            position: i64 [], how many tokens the cache holds already.
            caches: Keys and values of every layer, written in place.
            padding: i64 [batch], how many tokens of padding every row begins with: nobody attends to them, and they
                are not counted as positions. None where there is a single row.

        Returns:
            Logits [batch, 1, vocabulary].
        """
        from transformers.cache_utils import Cache

        from moec.aot.cache_layer import CallersLayer

        layers: list[Any] = [CallersLayer(k, v, position) for k, v in zip(caches[::2], caches[1::2], strict=True)]
        given: dict[str, Any] = {self.argument: Cache(layers=layers)}
        if padding is not None:
            before = padding[:, None]
            given["attention_mask"] = torch.arange(self.length)[None] >= before
            given["position_ids"] = (torch.arange(input_ids.shape[1]) + position - before).clamp(min=0)
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
        raise AotError("--generate takes --dynamic batch=1..8,seq=1..LENGTH", hint="LENGTH tokens fit into the cache")
    rows, (_, length) = ranges.values()
    model = wrapped.model
    several = rows[1] > 1
    if several and "position_ids" not in inspect.signature(model.forward).parameters:
        raise AotError(
            f"{source.text} takes no position_ids, which prompts of different lengths need",
            hint="compile it with --dynamic batch=1,...",
        )
    shapes = cache_shapes(model, source.args[0][:1, :2])
    dtype = next(model.parameters()).dtype
    module = Cached(model, length).eval()
    batch = example_size(rows, _ROWS)
    dim = {0: Dim("batch", min=rows[0], max=rows[1])} if rows[0] < rows[1] else {}
    programs = {}
    for name, count in ((PREFILL, 3), (DECODE, 1)):
        ids = source.args[0][:1, :1].expand(batch, count).contiguous()
        caches = [torch.zeros(batch, heads, length, width, dtype=dtype) for heads, width in shapes]
        seq = {1: Dim("seq", min=1, max=length)} if count > 1 else {}
        given: dict[str, Any] = {"input_ids": ids, "position": torch.tensor(0), "caches": caches}
        dynamic: dict[str, Any] = {"input_ids": dim | seq, "position": None, "caches": [dim] * len(caches)}
        if several:
            given["padding"], dynamic["padding"] = torch.zeros(batch, dtype=torch.int64), dim
        programs[name] = exported(module, source.text, (), given, dynamic)
    return programs, length


def generation_facts(source: Source, length: int) -> Mapping[str, tuple[int, ...]]:
    """What the manifest says about generating."""
    end = _setting(source.module, "eos_token_id")
    return {"cache": (length,), "end": end, "pad": _setting(source.module, "pad_token_id") or end[:1]}


def _setting(module: nn.Module | None, name: str) -> tuple[int, ...]:
    """Token ids of the model's settings for generating, else of its configuration."""
    model = getattr(module, "model", None)
    for settings in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(settings, name, None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
