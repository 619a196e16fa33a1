"""The layer as moec's backends run it in a compiled model, without the dispatch of the runtime op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.backends.registry import get_backend
from moec.calibration.layers import swiglu_layer
from moec.cost import LayerShape
from routing import Batch
from shapes import Shape

Call = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Weights:
    """Gate and up [E, 2I, H] and down [E, H, I] of one layer."""

    up: Tensor
    down: Tensor


def make_weights(shape: Shape, dtype: torch.dtype, copies: int) -> list[Weights]:
    """The same numbers ``copies`` times, each with memory of its own."""
    first = Weights(
        torch.empty(shape.experts, 2 * shape.inner, shape.hidden, dtype=dtype).uniform_(-0.03, 0.03),
        torch.empty(shape.experts, shape.hidden, shape.inner, dtype=dtype).uniform_(-0.03, 0.03),
    )
    return [first, *(Weights(first.up.clone(), first.down.clone()) for _ in range(copies - 1))]


def moec_calls(backend: str, target: str, dtype: str, shape: Shape, copies: Sequence[Weights]) -> list[Call]:
    """One call for each copy of the weights, through the backend of that name.

    Raises:
        MoecError: The backend cannot run the layer here.
    """
    sizes = (shape.hidden, shape.inner, shape.hidden, shape.experts, shape.top_k)
    graph = swiglu_layer(LayerShape(*sizes, dtype=dtype))
    found = get_backend(backend)
    kernel = found.load(found.lower(graph, target))

    def bind(w: Weights) -> Call:
        return lambda batch: kernel.forward([batch.x, batch.ids, batch.weights, w.up, w.down])[0]

    return [bind(w) for w in copies]
