"""Router choices, and which copy of which expert's weights a call reads.

Weights shall come from memory, as they do in a model of many layers. So a layer has several copies of its weights, the
copies take turns, and within a copy the experts that were used longest ago come first. An expert that a call touches
was last read more than a gigabyte of other weights ago, also where a call touches few.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from shapes import Shape

MOST_COPIES = 16


@dataclass(frozen=True)
class Batch:
    """One call's inputs: tokens [T, H], expert ids [T, k] twice, and router weights f32[T, k]."""

    x: Tensor
    ids: Tensor
    ids_i32: Tensor
    weights: Tensor


class Deck:
    """Deals the experts of several copies of one layer, those that were used longest ago first."""

    def __init__(self, copies: int, experts: int) -> None:
        self.queues = [deque(random.sample(range(experts), experts)) for _ in range(copies)]
        self.turn = 0

    def deal(self, ids: Tensor) -> tuple[int, Tensor]:
        """Another copy, and ``ids`` with other experts in place of theirs: as many, with as many rows each."""
        copy = self.turn % len(self.queues)
        self.turn += 1
        queue = self.queues[copy]
        names, places = ids.unique(return_inverse=True)
        dealt = [queue.popleft() for _ in range(len(names))]
        queue.extend(dealt)
        return copy, torch.tensor(dealt)[places]


def copies_for(layer_bytes: int, rotate_bytes: float, stores: int, free_bytes: float) -> int:
    """Copies of a layer so that ``rotate_bytes`` are read between two uses, or as many as memory holds.

    A call may touch half of a copy, so that the others' halves must be enough.

    Args:
        layer_bytes: Of one copy.
        rotate_bytes: To lie between two uses of the same weights.
        stores: How many kinds of storage hold every copy (the model's own, and each peer's packed one).
        free_bytes: That all of it may take.
    """
    wanted = 1 + math.ceil(2 * rotate_bytes / layer_bytes) if layer_bytes < 2 * rotate_bytes else 1
    return max(1, min(wanted, MOST_COPIES, int(free_bytes / (stores * layer_bytes))))


def draw_ids(shape: Shape, tokens: int, exponent: float) -> Tensor:
    """i64[T, k] different experts per token; expert number n has weight n^-exponent (0: all alike).

    Sampling without replacement by Gumbel noise on the logarithms of the weights.
    """
    popularity = torch.arange(1, shape.experts + 1, dtype=torch.float32).pow(-exponent).log()
    gumbel = -torch.empty(tokens, shape.experts).exponential_().log()
    return (popularity + gumbel).topk(shape.top_k).indices


def even_ids(ids: Tensor) -> Tensor:
    """The same number of rows over the same experts, spread as evenly as it goes: same FLOPs, same bytes."""
    names = ids.unique()
    names = names[torch.randperm(len(names))]
    even: Tensor = names[torch.arange(ids.numel()) % len(names)]
    return even.view(ids.shape)


def draw_tokens(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens [T, H] and router weights f32[T, k]."""
    return torch.randn(tokens, shape.hidden).to(dtype), torch.softmax(torch.randn(tokens, shape.top_k), -1)
