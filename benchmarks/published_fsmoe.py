"""FSMoE's schedules on the layers of its table 4, in the simulator's engine.

FSMoE: A Flexible and Scalable Training System for Sparse Mixture-of-Experts Models, arXiv:2501.10714. Experts are
spread over nodes (AlltoAll) and each over a node's GPUs (AllGather before it, ReduceScatter behind it). Latencies and
bandwidths of collectives and GEMMs are those that the paper measured on its testbed B (figure 5), degrees the best of
1, 2, 4 and 8. A backward has twice the products, and sums the attention's gradients over the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from moec.cost.links import Link
from moec.simulate import Topology, simulate
from moec.simulate.steps import Collective, Compute, Flow, Start, Step, Wait
from moec.simulate.topology import Device
from moec.targets import parse_target

ALL_TO_ALL, INSIDE = Link(1.75e-4, 1 / 3.06e-10), Link(3.20e-5, 1 / 1.68e-10)
SUM_OVER_NODES = 5.99e-10  # seconds a byte of an AllReduce
GEMM_S, SECONDS_A_FLOP = 9.24e-5, 4.42e-14
GPUS, TOP_K, BYTES = 4, 2, 4
DEGREES = (1, 2, 4, 8)
PARTS = (0.0, 0.5, 1.0)
"""How much of the gradients' sum may run in the expert layer; the rest runs beside attention."""
MACHINE = Topology(
    "testbed B", "eight nodes of four", Device(parse_target("cuda:sm80"), 0.0, 0.0), 2, 2, INSIDE, ALL_TO_ALL
)


@dataclass(frozen=True)
class Layer:
    """What one of the paper's layers takes, in bytes and seconds.

    Attributes:
        sent: Bytes of an AlltoAll of one GPU.
        flops: Of its experts, forward.
        products: GEMMs of its experts.
        attention: Seconds of its attention's products, forward.
        gradients: Bytes that are summed over nodes.
    """

    sent: float
    flops: float
    products: int
    attention: float
    gradients: float


def layers(every: int = 1) -> list[Layer]:
    """The 1458 layers of table 4, of which those with other numbers of heads are alike; every ``every``-th of them."""
    found = []
    for b, tokens, m, scale, f, products in product(
        (1, 2, 4), (256, 512, 1024), (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, 1.0), (2, 3)
    ):
        rows = TOP_K * f * b * tokens  # of a node's experts, and of all GPUs of a node together
        attention = (8 * b * tokens * m * m + 4 * b * tokens * tokens * m) / GPUS
        found.append(
            Layer(
                sent=rows / GPUS * m * BYTES,
                flops=products * 2 * rows * m * scale * m / GPUS,
                products=products,
                attention=6 * GEMM_S + attention * SECONDS_A_FLOP,
                gradients=4 * m * m / GPUS * BYTES,
            )
        )
    return found[::every]


def expert_layer(layer: Layer, degree: int, times: int, two_streams: bool, gradients: float) -> float:
    """Seconds of the experts between their collectives, in ``degree`` chunks.

    Args:
        layer: Which.
        degree: Chunks.
        times: Products of the forward, or of the backward.
        two_streams: Collectives inside nodes run beside those between nodes.
        gradients: Bytes that are summed over nodes behind the first AlltoAlls.
    """
    inter, intra = ("inter", "intra") if two_streams else ("comm", "comm")
    collectives: list[Collective] = []

    def make(group: str, to: int, bytes: float) -> int:
        """A collective as what one GPU sends: to the next node, or inside its own."""
        collectives.append(Collective(group, group, (0, 1, 2), (Flow(0, to, max(1.0, bytes)),)))
        return len(collectives) - 1

    seconds = times * (layer.products * GEMM_S + layer.flops / degree * SECONDS_A_FLOP)
    starts: list[Step] = []
    gathered = []
    for _ in range(degree):
        sent = make(inter, 2, layer.sent / degree)
        gathered.append(make(intra, 1, GPUS * layer.sent / degree))
        starts += [Start(sent), Start(gathered[-1], after=(sent,))]
    if gradients:
        summed = make(inter, 2, gradients * SUM_OVER_NODES * ALL_TO_ALL.bytes_per_s)
        starts.append(Start(summed))
    steps, last = [*starts], 0
    for g in gathered:
        scattered = make(intra, 1, GPUS * layer.sent / degree)
        last = make(inter, 2, layer.sent / degree)
        steps += [Wait(g), Compute("experts", seconds), Start(scattered), Start(last, after=(scattered,))]
    others = [s for s in steps if isinstance(s, Start)]
    return simulate([[*steps, Wait(last)], others, others], collectives, MACHINE).seconds


def sum_seconds(gradients: float) -> float:
    """An AllReduce over nodes by itself."""
    return ALL_TO_ALL.alpha_s + gradients * SUM_OVER_NODES if gradients else 0.0


def backward(layer: Layer, degree: int, two_streams: bool, part: float | None) -> float:
    """Expert layer and attention; gradients are summed in the former by ``part``, or behind all where it is None."""
    attention = 2 * layer.attention
    if part is None:
        return expert_layer(layer, degree, 2, two_streams, 0.0) + attention + sum_seconds(layer.gradients)
    within = expert_layer(layer, degree, 2, two_streams, part * layer.gradients)
    return within + max(attention, sum_seconds((1 - part) * layer.gradients))


def step(layer: Layer, schedule: str) -> float:
    """Forward and backward of a layer under a schedule: ``tutel``, ``tutel-improved``, ``no-iio`` or ``fsmoe``."""
    two = schedule == "fsmoe"
    parts: tuple[float | None, ...] = {"tutel": (None,), "tutel-improved": (0.0,)}.get(schedule, PARTS)
    ahead = {d: expert_layer(layer, d, 1, two, 0.0) + layer.attention for d in DEGREES}
    back = {d: min(backward(layer, d, two, p) for p in parts) for d in DEGREES}
    if schedule.startswith("tutel"):  # one degree for both
        return min(ahead[d] + back[d] for d in DEGREES)
    return min(ahead.values()) + min(back.values())


def gain(schedule: str, every: int = 1) -> float:
    """How many times as fast as Tutel's schedule, mean over layers."""
    found = layers(every)
    return sum(step(x, "tutel") / step(x, schedule) for x in found) / len(found)
