"""What a model of transformers sees of the caller's cache; it needs transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer


class CallersLayer(StaticLayer):
    """One layer's keys and values, which are the caller's and are written in place.

    Args:
        keys, values: ``[batch, heads, length, width]``.
        position: i64 [], how many tokens they hold. It stays as it is, so that besides the caller's keys and values no
            layer writes into memory that is not its own; of a copy of its own, so that layers' nodes are alike.
    """

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, position.clone()
        self.device, self.is_initialized = keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values behind those that are there; returns all."""
        assert self.keys is not None and self.values is not None
        places = torch.arange(key_states.shape[2], device=self.keys.device) + self.cumulative_length
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values
