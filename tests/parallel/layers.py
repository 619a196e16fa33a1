"""Small expert layers on several ranks: their graphs, their tokens, and the one process that they are held against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.backends.base import Backend
from moec.backends.reference.world import Groups
from moec.ir.core import Graph
from moec.ir.parallel_semantics import chunk_sizes
from moec.ir.torch_dtypes import TO_TORCH
from moec.parallel.sample import sample_layer
from moec.passes import PassContext, PassManager

HISTOGRAMS = ("spread", "one_expert", "one_token", "empty_ranks", "no_tokens", "sentinels")


@dataclass(frozen=True)
class Layer:
    """One layer: E experts on N ranks of ``nodes`` nodes, k choices a token."""

    ranks: int = 4
    experts: int = 5
    top_k: int = 2
    nodes: int = 1
    hidden: int = 16
    inner: int = 32
    dtype: str = "f32"

    @property
    def sizes(self) -> tuple[int, ...]:
        return chunk_sizes(self.experts, self.ranks)

    @property
    def groups(self) -> Groups:
        """The axis and its two parts."""
        each = self.ranks // self.nodes
        return {
            "ep": [list(range(self.ranks))],
            "ep.node": [[n * each + p for n in range(self.nodes)] for p in range(each)],
            "ep.local": [[n * each + p for p in range(each)] for n in range(self.nodes)],
        }

    def graph(self, own: int, sizes: tuple[int, ...]) -> Graph:
        return sample_layer(sizes, own, self.top_k, self.hidden, self.inner, self.dtype, sentinels=True)

    def alone(self) -> Graph:
        """One process with all experts: the graph's only op is ``moe.experts``."""
        return run("expert-parallel", self.graph(self.experts, (self.experts,)))

    def gathered(self, rank: int) -> Graph:
        """A rank's graph before any pass."""
        return self.graph(self.sizes[rank], self.sizes)

    def spread(self, rank: int, pipeline: str) -> Graph:
        """A rank's graph after a pipeline, in which ``{rank}`` stands for the rank."""
        return run(pipeline.replace("<rank>", str(rank)).replace("<nodes>", str(self.nodes)), self.gathered(rank))

    def weights(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """All experts' up and down weights."""
        gen = torch.Generator().manual_seed(seed + 1000)
        dtype = TO_TORCH[self.dtype]
        up = torch.randn(self.experts, 2 * self.inner, self.hidden, generator=gen) * 0.3
        down = torch.randn(self.experts, self.hidden, self.inner, generator=gen) * 0.3
        return up.to(dtype), down.to(dtype)

    def share(self, rank: int, whole: tuple[Tensor, ...]) -> list[Tensor]:
        """This rank's part of stacked weights."""
        start = sum(self.sizes[:rank])
        return [t[start : start + self.sizes[rank]].clone() for t in whole]

    def tokens(self, histogram: str, seed: int = 0) -> list[list[Tensor]]:
        """x, ids and weights of every rank."""
        gen = torch.Generator().manual_seed(seed)
        found = []
        for rank in range(self.ranks):
            count = {"one_token": 1, "no_tokens": 0}.get(histogram, 3 + 2 * rank)
            if histogram == "empty_ranks" and rank % 2:
                count = 0
            score = torch.rand(count, self.experts, generator=gen)
            if histogram == "one_expert":
                score[:, self.experts - 1] = 2.0
            if histogram == "empty_ranks":
                score[:, self.top_k :] = -1.0
            ids = score.argsort(dim=1, descending=True)[:, : self.top_k].contiguous()
            if histogram == "sentinels":
                ids[torch.rand(ids.shape, generator=gen) < 0.5] = self.experts
                ids[torch.rand(ids.shape, generator=gen) < 0.2] = -1
            x = torch.randn(count, self.hidden, generator=gen).to(TO_TORCH[self.dtype])
            found.append([x, ids, torch.randn(count, self.top_k, generator=gen)])
        return found

    def gradients(self, tokens: list[list[Tensor]], seed: int = 0) -> list[Tensor]:
        """A gradient of every rank's result."""
        gen = torch.Generator().manual_seed(seed + 2000)
        return [torch.randn(t[0].shape, generator=gen).to(t[0].dtype) for t in tokens]


def run(pipeline: str, graph: Graph) -> Graph:
    """The graph after a pipeline."""
    PassManager(pipeline, repro=None).run(graph, PassContext())
    return graph


def one_process(
    layer: Layer, backend: Backend, tokens: list[list[Tensor]], grads: list[Tensor] | None, target: str = "cpu"
) -> tuple[Tensor, list[Tensor]]:
    """Result and gradients (x, weights, up, down) of one process with all experts, on all ranks' tokens together."""
    graph = layer.alone()
    kernel = backend.load(backend.lower(graph, target))
    inputs = [torch.cat([t[i] for t in tokens]) for i in range(3)] + list(layer.weights())
    (out,) = kernel.forward(inputs)
    if grads is None:
        return out, []
    found = kernel.backward([torch.cat(grads)], inputs, [True, False, True, True, True])
    return out, [g for g in found if g is not None]


def in_f64(layer: Layer) -> Layer:
    return replace(layer, dtype="f64")
