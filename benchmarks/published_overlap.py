"""What the simulator says of whole models whose rows travel while something else is computed, and without that.

Two micro-batches of a step without gradients run as SGLang's two-batch overlap has them; a forward beside the backward
of another micro-batch as DeepSeek's DualPipe and Megatron-Core's combined schedule have it. Schedules run on two ranks
whose link takes as long as the collectives of all ranks do. All layers are alike, so one in the middle of several
stands for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moec.cost.attention import BACKWARD_PRODUCTS
from moec.cost.links import Link
from moec.simulate import Topology, simulate
from moec.simulate.steps import Collective, Compute, Flow, Start, Step, Wait
from published_models import MODELS, Parts, around_seconds, parts_of

BYTES_A_SECOND = 1e9
"""Of the two ranks' link; any number, as messages are as long as their time says."""
FEW, MORE = 2, 4
"""Layers of two simulations, whose difference is that of layers in the middle."""


class Schedule:
    """Steps of a rank, and the collectives that they speak of."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.collectives: list[Collective] = []

    def compute(self, part: tuple[float, float], times: float = 1.0) -> None:
        self.steps.append(Compute("part", part[0] * times, part[1] * times))

    def start(self, seconds: float) -> int:
        size = seconds * BYTES_A_SECOND
        self.collectives.append(Collective("rows", "ep", (0, 1), (Flow(0, 1, size), Flow(1, 0, size))))
        self.steps.append(Start(len(self.collectives) - 1))
        return len(self.collectives) - 1

    def wait(self, number: int | None) -> None:
        if number is not None:
            self.steps.append(Wait(number))

    def seconds(self, topology: Topology) -> float:
        device = replace(topology.device, start_s=0.0)
        two = Topology("two", "of many", device, 1, 2, Link(0.0, BYTES_A_SECOND))
        return simulate([self.steps] * 2, self.collectives, two).seconds


def one_batch(parts: Parts, layers: int) -> Schedule:
    """All parts one after the other."""
    found = Schedule()
    for _ in range(layers):
        found.compute(parts.attention)
        found.compute(parts.shared)
        found.wait(found.start(parts.there))
        found.compute(parts.experts)
        found.wait(found.start(parts.back))
    return found


def two_batches(parts: Parts, layers: int) -> Schedule:
    """Two micro-batches: the rows of one travel while the other is computed."""
    found = Schedule()
    home: list[int | None] = [None, None]
    for _ in range(layers):
        there = []
        for back in home:
            found.wait(back)
            found.compute(parts.attention)
            there.append(found.start(parts.there))
        for i, sent in enumerate(there):
            found.compute(parts.shared)
            found.wait(sent)
            found.compute(parts.experts)
            home[i] = found.start(parts.back)
    for back in home:
        found.wait(back)
    return found


def forward_and_backward(parts: Parts, layers: int) -> Schedule:
    """A micro-batch forward, then one backward, without overlap. Backwards a product is two."""
    found = one_batch(parts, layers)
    for _ in range(layers):
        found.wait(found.start(parts.there))
        found.compute(parts.experts, 2)
        found.compute(parts.shared, 2)
        found.wait(found.start(parts.back))
        found.compute(parts.attention, BACKWARD_PRODUCTS)
        found.compute((parts.gradients, parts.gradients))
    return found


def forward_beside_backward(parts: Parts, layers: int) -> Schedule:
    """The same, each hiding the other's rows: DeepSeek-V3, arXiv:2412.19437, figure 4."""
    found = Schedule()
    home: int | None = None
    for _ in range(layers):
        gradients = found.start(parts.there)
        found.wait(home)
        found.compute(parts.attention)
        there = found.start(parts.there)
        found.wait(gradients)
        found.compute(parts.experts)  # gradients of rows
        found.compute(parts.shared)
        back = found.start(parts.back)
        found.compute(parts.experts)  # gradients of weights
        found.compute(parts.shared, 2)  # and the shared expert forward
        found.compute((parts.gradients, parts.gradients))
        found.wait(there)
        found.compute(parts.experts)
        home = found.start(parts.back)
        found.wait(back)
        found.compute(parts.attention, BACKWARD_PRODUCTS)
    found.wait(home)
    return found


def layer_seconds(topology: Topology, make: Callable[[Parts, int], Schedule], parts: Parts) -> float:
    """Of one layer among many."""
    few, more = (make(parts, n).seconds(topology) for n in (FEW, MORE))
    return (more - few) / (MORE - FEW)


def step_seconds(topology: Topology, p: dict[str, Any], overlapped: bool) -> float:
    """A step of ``tokens`` tokens of every rank through the whole model, without gradients."""
    tokens, layers = p["tokens"], MODELS[p["model"]].layers
    batches = 2 if overlapped else 1
    make = two_batches if overlapped else one_batch
    layer = layer_seconds(topology, make, parts_of(topology, p, tokens // batches))
    return layers * layer + batches * around_seconds(topology, p, tokens / batches)


def two_batch_gain(topology: Topology, p: dict[str, Any]) -> float:
    """How many times as fast two micro-batches are as the same tokens in one."""
    return step_seconds(topology, p, False) / step_seconds(topology, p, True)


def throughput(topology: Topology, p: dict[str, Any]) -> float:
    """Tokens a second of a node (or of ``devices`` ranks), with two micro-batches."""
    return p.get("devices", topology.per_node) * p["tokens"] / step_seconds(topology, p, True)


def trained_seconds(topology: Topology, p: dict[str, Any], overlapped: bool) -> float:
    """A training step: ``batches`` micro-batches, forward and backward, of a model on one stage."""
    make = forward_beside_backward if overlapped else forward_and_backward
    layer = layer_seconds(topology, make, parts_of(topology, p, p["tokens"]))
    return float(p["batches"] * (MODELS[p["model"]].layers * layer + 3 * around_seconds(topology, p, p["tokens"])))


def trained_gain(topology: Topology, p: dict[str, Any]) -> float:
    """How many times as fast a training step is with overlap."""
    return trained_seconds(topology, p, False) / trained_seconds(topology, p, True)


def pair(topology: Topology, p: dict[str, Any]) -> float:
    """Seconds of a forward of ``layers`` layers beside a backward of as many."""
    return forward_beside_backward(parts_of(topology, p, p["tokens"]), p["layers"]).seconds(topology)
