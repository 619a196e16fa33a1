"""Layers with zero-compute experts in the form that static shapes ask for, and each of them token by token.

Such a layer sends every slot to some expert that has weights. A slot that needs none gets the id of one that exists
and the weight 0, and what it stands for is added beside the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.passes.layers import HIDDEN, INNER, Layer

KINDS = ("zero", "identity", "constant", "null")
EPS = 1e-9


def _put(values: Tensor, dead: Tensor, number: float) -> Tensor:
    out = values.clone()
    out[dead] = number
    return out


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda w, dead: torch.where(dead, 0, w),
    "where live": lambda w, dead: torch.where(~dead, w, 0.0),
    "where zeros": lambda w, dead: torch.where(dead, torch.zeros_like(w), w),
    "masked_fill": lambda w, dead: w.masked_fill(dead, 0),
    "times bool": lambda w, dead: w * ~dead,
    "times float": lambda w, dead: dead.logical_not().float() * w,
    "one minus": lambda w, dead: w * (1 - dead.to(w.dtype)),
    "put": lambda w, dead: _put(w, dead, 0),
    "as a vector": lambda w, dead: w.view(-1).masked_fill(dead.view(-1), 0).view(w.shape),
}
"""How a weight of a slot that needs no expert becomes 0."""
OVERWRITTEN: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "where": lambda ids, dead, experts: torch.where(dead, 0, ids),
    "masked_fill": lambda ids, dead, experts: ids.masked_fill(dead, experts - 1),
    "bound": lambda ids, dead, experts: ids.clamp(max=experts - 1),
    "remainder": lambda ids, dead, experts: ids % experts,
    "times": lambda ids, dead, experts: ids * ~dead,
    "put": lambda ids, dead, experts: _put(ids, dead, 0),
}
"""How it gets the id of an expert that exists."""


@dataclass(frozen=True)
class ZeroLayer:
    """A layer of ``experts`` experts with weights, and one more for each of ``kinds``.

    Attributes:
        experts: E.
        kinds: What the ids from E on stand for.
        top_k: k, of all of them.
        masked, overwritten: Keys of the tables above.
        form: As of :class:`tests.passes.layers.Layer`.
        keep: Weights below this share of the largest are dropped as well (0: none), by a mask of floats.
    """

    experts: int = 3
    kinds: tuple[str, ...] = ("zero", "identity")
    top_k: int = 2
    masked: str = "where"
    overwritten: str = "where"
    form: str = "batched"
    keep: float = 0.0

    def args(self, tokens: int, all_dropped: bool = False, zeros: bool = False) -> list[Tensor]:
        """x [T, H], logits [T, E + Z], vectors [Z, H], mixers [Z, 2, H], and the experts' weights."""
        gen = torch.Generator().manual_seed(tokens)
        choices = self.experts + len(self.kinds)
        x, logits = torch.randn(tokens, HIDDEN, generator=gen), torch.randn(tokens, choices, generator=gen)
        if all_dropped:
            logits[:, : self.experts] -= 100
        if zeros:
            x[::2] = 0
        size = len(self.kinds)
        extra = torch.randn(size, HIDDEN, generator=gen), torch.randn(size, 2, HIDDEN, generator=gen)
        return [x, logits, *extra, *self.layer().weights(1)]

    def layer(self) -> Layer:
        return Layer(form=self.form, experts=self.experts, top_k=self.top_k, router=self.route)

    def choose(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        w, ids = logits.softmax(-1).topk(k, -1)
        for i, kind in enumerate(self.kinds):
            if kind == "null":
                w = MASKED[self.masked](w, ids == self.experts + i)
        if "null" in self.kinds:
            w = w / (w.sum(-1, keepdim=True) + EPS)
        if self.keep:
            w = w * (w >= self.keep * w.amax(-1, keepdim=True)).to(w.dtype)
        return w, ids

    def route(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Weights and ids for the experts that have weights."""
        w, ids = self.choose(logits, k)
        dead = ids >= self.experts
        return MASKED[self.masked](w, dead), OVERWRITTEN[self.overwritten](ids, dead, self.experts)

    def forward(self, x: Tensor, logits: Tensor, vectors: Tensor, mixers: Tensor, *params: Tensor) -> Tensor:
        """The layer, in the static form."""
        y = self.layer().forward(x, logits, *params)
        w, ids = self.choose(logits, self.top_k)
        for i, kind in enumerate(self.kinds):
            share = torch.where(ids == self.experts + i, w, 0).sum(-1, keepdim=True)
            if kind == "identity":
                y = y + share * x
            elif kind == "constant":
                a, b = (x @ mixers[i].t()).softmax(-1).split(1, -1)
                y = y + share * (a * x + b * vectors[i])
        return y

    def loop(self, x: Tensor, logits: Tensor, vectors: Tensor, mixers: Tensor, *params: Tensor) -> tuple[Tensor, int]:
        """The layer slot by slot in f64, and how many slots went through an expert with weights."""
        x, vectors, mixers, up, down = (t.double() for t in (x, vectors, mixers, *params))
        probabilities, ids = logits.softmax(-1).topk(self.top_k, -1)
        y, rows = torch.zeros_like(x), 0
        for t in range(x.shape[0]):
            slots = list(zip(probabilities[t].double(), ids[t].tolist(), strict=True))
            if "null" in self.kinds:
                slots = [(w, e) for w, e in slots if e < self.experts or self.kinds[e - self.experts] != "null"]
                total = sum(float(w) for w, _ in slots) + EPS
                slots = [(w / total, e) for w, e in slots]
            if self.keep and slots:
                largest = max(float(w) for w, _ in slots)
                slots = [(w, e) for w, e in slots if w >= self.keep * largest]
            for w, e in slots:
                if e < self.experts:
                    h = up[e] @ x[t]
                    gate, wide = h[:INNER], h[INNER:]
                    y[t] += w * (down[e] @ (gate * gate.sigmoid() * (wide.clamp(-2, 2) + 1)))
                    rows += 1
                elif self.kinds[e - self.experts] == "identity":
                    y[t] += w * x[t]
                elif self.kinds[e - self.experts] == "constant":
                    a, b = (mixers[e - self.experts] @ x[t]).softmax(-1)
                    y[t] += w * (a * x[t] + b * vectors[e - self.experts])
        return y, rows
