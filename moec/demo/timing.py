"""Times of one model under several compilers, prefill and decode, measured alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGITS_KEPT = 64  # of the last tokens of a prefill: enough to check, and the head does not drown the layers
_FEWEST_RUNS = 2
_MOST_RUNS = 15
_ENOUGH_S = 6.0  # of measuring one thing: a slow machine should not pay for precision


@dataclass(frozen=True)
class Times:
    """Seconds of one variant: first calls (with compiling), then the median of later ones."""

    name: str
    first: float
    prefill: float
    decode: float


def prefill(model: Any, input_ids: Tensor) -> Tensor:
    """One forward over all tokens; the logits [kept, V] of the last ones."""
    return model(input_ids=input_ids, use_cache=False, logits_to_keep=last_tokens(LOGITS_KEPT)).logits[0]


def last_tokens(count: int) -> Tensor:
    """Positions of the last ``count`` tokens.

    As an index, not as a number: a number makes the head's input a strided view, for which eager PyTorch copies the
    whole vocabulary matrix. That would be measured instead of the layers.
    """
    return torch.arange(-count, 0)


class Decode:
    """One decode step after ``input_ids``, over and over: same cache, same position, the same work every time.

    Attributes:
        router_logits: Of the prefill that filled the cache, one [T, E] tensor a layer.
    """

    def __init__(self, model: Any, input_ids: Tensor) -> None:
        from transformers import StaticCache

        length = input_ids.shape[1]
        self.cache: Any = StaticCache(config=model.config, max_cache_len=length + 16)
        out = model(
            input_ids=input_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            output_router_logits=True,
        )
        self.router_logits: tuple[Tensor, ...] = out.router_logits
        self.position = torch.tensor([[length]])
        self.token = input_ids[:, -1:].clone()
        self.length = length

    def __call__(self, model: Any) -> Tensor:
        self.rewind()
        return model(
            input_ids=self.token,
            past_key_values=self.cache,
            position_ids=self.position,
            use_cache=True,
            logits_to_keep=1,
        ).logits[0]

    def rewind(self) -> None:
        """Puts the cache back to where the prefill left it. Only its counters move: the new key is overwritten."""
        for layer in self.cache.layers:
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length.fill_(self.length)
            elif hasattr(layer, "cumulative_length"):
                layer.cumulative_length = self.length


def measure(name: str, model: Any, input_ids: Tensor, decode: Decode) -> tuple[Times, Tensor]:
    """Times one variant; also the logits of its prefill."""
    start = time.perf_counter()
    logits = prefill(model, input_ids)
    decode(model)
    first = time.perf_counter() - start
    prefill_s = _median(lambda: prefill(model, input_ids))
    decode(model)  # the second length may compile once more
    decode_s = _median(lambda: decode(model))
    return Times(name, first, prefill_s, decode_s), logits


def _median(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    while len(seconds) < _FEWEST_RUNS or (len(seconds) < _MOST_RUNS and sum(seconds) < _ENOUGH_S):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
