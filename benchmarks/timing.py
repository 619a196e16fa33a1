"""Times of several implementations of one layer: same numbers, one process, one call each in turn, medians.

Before any timing, two tokens of every implementation's result are held against a loop in f32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ours import Weights
from peers import Implementation
from routing import Batch, Deck, draw_ids, draw_tokens
from shapes import Shape

FEWEST_ROUNDS = 3
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
"""Largest |difference| over the largest |expected|."""


@dataclass
class Cell:
    """One shape at one token count.

    Attributes:
        seconds: Every implementation's times, in the order taken.
        touched: Mean count of experts that a call touches.
        errors: Largest difference of two tokens to a loop in f32, relative to the largest output.
    """

    shape: Shape
    tokens: int
    touched: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        """Seconds of each implementation."""
        return {name: statistics.median(t) for name, t in self.seconds.items()}


def error_of(got: Tensor, batch: Batch, weights: Weights) -> float:
    """The largest relative difference of the first and the last token's result to a loop in f32."""
    worst = 0.0
    for t in {0, len(got) - 1}:
        want = torch.zeros(got.shape[1])
        for expert, weight in zip(batch.ids[t].tolist(), batch.weights[t].tolist(), strict=True):
            gate, up = (weights.up[expert].float() @ batch.x[t].float()).chunk(2)
            want += weight * (weights.down[expert].float() @ (torch.nn.functional.silu(gate) * up))
        error = float((got[t].float() - want).abs().max() / want.abs().max())
        worst = error if error != error else max(worst, error)
    return worst


def verdict(error: float, dtype: torch.dtype) -> str | None:
    """Why a result with that error cannot be used, or None."""
    return None if error <= TOLERANCE[dtype] else f"its result is wrong: {error:.1e} off a loop in f32"


class Bench:
    """One shape's implementations and the weights that they take turns on."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, copies: Sequence[Weights], layers: Sequence[Implementation]
    ) -> None:
        self.shape, self.dtype, self.copies = shape, dtype, copies
        self.layers = list(layers)
        own = Deck(len(copies), shape.experts)  # those that read the model's weights where they lie share them
        self.decks = {i.name: Deck(len(copies), shape.experts) if i.packed else own for i in layers}

    def warm_up(self, tell: Callable[[str], None]) -> None:
        """Every copy of every implementation once, all experts touched; who fails is told of and dropped."""
        ids = torch.arange(-(-self.shape.experts // self.shape.top_k) * self.shape.top_k) % self.shape.experts
        batch = self._batch(ids.view(-1, self.shape.top_k))
        for layer in list(self.layers):
            try:
                for call in layer.calls:
                    call(batch)
            except RuntimeError as error:
                self._drop(layer, (str(error).splitlines() or ["an error"])[0][:200], tell)

    def check(self, tokens: int, exponent: float, tell: Callable[[str], None]) -> dict[str, float]:
        """One call each with the same choices; errors of those that are right, the others are told of and dropped.

        Raises:
            SystemExit: moec's own result is wrong.
        """
        batch = self._batch(draw_ids(self.shape, tokens, exponent))
        errors = {}
        for layer in list(self.layers):
            error = error_of(layer.calls[0](batch), batch, self.copies[0])
            wrong = verdict(error, self.dtype)
            if wrong is None:
                errors[layer.name] = error
            elif layer.name in ("cpu", "aten"):
                raise SystemExit(f"{self.shape.name}, {tokens} tokens, {layer.name}: {wrong}")
            else:
                self._drop(layer, wrong, tell)
        return errors

    def time(self, tokens: int, exponent: float, seconds: float, tell: Callable[[str], None]) -> Cell:
        """Times one cell: at least three rounds, then until ``seconds`` have gone by."""
        cell = Cell(self.shape, tokens, errors=self.check(tokens, exponent, tell))
        cell.seconds = {layer.name: [] for layer in self.layers}
        touched: list[int] = []
        stop = time.perf_counter() + seconds
        while len(touched) < FEWEST_ROUNDS or time.perf_counter() < stop:
            ids = draw_ids(self.shape, tokens, exponent)
            first = len(touched) % len(self.layers)  # nobody always follows the same one
            for layer in (*self.layers[first:], *self.layers[:first]):
                cell.seconds[layer.name].append(self.time_once(layer, ids))
            touched.append(len(ids.unique()))
        cell.touched = statistics.mean(touched)
        return cell

    def time_once(self, layer: Implementation, ids: Tensor) -> float:
        """Seconds of one call with choices like ``ids``, on experts that were not read lately."""
        copy, dealt = self.decks[layer.name].deal(ids)
        batch, call = self._batch(dealt), layer.calls[copy]
        start = time.perf_counter()
        call(batch)
        return time.perf_counter() - start

    def release(self) -> None:
        """Gives back what the implementations hold."""
        for layer in self.layers:
            layer.calls.clear()
            layer.release()
        self.layers.clear()

    def _batch(self, ids: Tensor) -> Batch:
        x, w = draw_tokens(self.shape, len(ids), self.dtype)
        return Batch(x, ids, ids.to(torch.int32), w)

    def _drop(self, layer: Implementation, reason: str, tell: Callable[[str], None]) -> None:
        tell(f"{self.shape.name}: {layer.name} is left out: {reason}")
        self.layers.remove(layer)
        layer.calls.clear()
        layer.release()
