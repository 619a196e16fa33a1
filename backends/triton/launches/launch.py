"""The launch of a layer for some number of tokens: tiles or the form without them, from the model's times.

Calls of similar sizes share a launch, so that a server that meets every number of tokens compiles a kernel for each
doubling at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from moec.backends.triton.kernels.sort import CHUNK
from moec.backends.triton.launches.choose import Choice, Layer, load_of, near, pick
from moec.backends.triton.launches.device import Device
from moec.backends.triton.launches.gemm_time import LAUNCH_SECONDS
from moec.backends.triton.launches.tiles import Launch
from moec.backends.triton.launches.tuned import Timer, key_of, lookup, measure
from moec.backends.triton.launches.usage import ITEM_BYTES, usage
from moec.backends.triton.launches.vector_time import vector_time
from moec.backends.triton.spec import Spec

_MOST_VECTORS = 64
MOST_TOKENS = 1 << 17
"""Calls of more are launched as calls of so many are."""
_TENSOR_MEMORY_ACCESS = 90
"""The first architecture whose loads go through descriptors."""


@dataclass(frozen=True)
class Planned:
    """A launch and what is expected of it.

    Attributes:
        launch: How the kernels run.
        tokens: Of the largest call that it is for.
        bound: ``"memory"`` or ``"compute"``: what the GEMMs are limited by.
        parts: Name of a step, its predicted seconds, and those that no kernel can beat.
    """

    launch: Launch
    tokens: int
    bound: str
    parts: tuple[tuple[str, float, float], ...]

    @property
    def seconds(self) -> float:
        """Predicted, for so many tokens: all kernels of the layer."""
        return sum(seconds for _, seconds, _ in self.parts)

    @property
    def limit_seconds(self) -> float:
        """What no kernels of these steps can beat."""
        return sum(limit for _, _, limit in self.parts)


def layer_of(spec: Spec) -> Layer:
    """The sizes that times depend on."""
    dtype = "f8e4m3fn" if spec.fp8 else spec.dtype
    parts = 2 if spec.gated else 1
    return Layer(
        spec.hidden, spec.up, spec.out, spec.experts, spec.top_k, parts, dtype, spec.up_bias, spec.down_bias,
        apart=not spec.stacked,
    )  # fmt: skip


def rounded_up(tokens: int) -> int:
    """The least power of two from ``tokens`` up."""
    return min(MOST_TOKENS, 1 << max(0, tokens - 1).bit_length())


def schedule(spec: Spec, device: Device, low: int, high: int) -> list[Planned]:
    """The launches for calls of ``low`` to ``high`` tokens; the last of those with equal parameters stands for all."""
    found: list[Planned] = []
    tokens = rounded_up(max(1, low))
    while True:
        planned = plan_launch(spec, tokens, device)
        if found and found[-1].launch == planned.launch:
            found.pop()
        found.append(planned)
        if tokens >= high or tokens >= MOST_TOKENS:
            return found
        tokens *= 2


def plan_launch(spec: Spec, tokens: int, device: Device) -> Planned:
    """The launch for a call of ``tokens`` tokens (from 1 up): that of the next power of two."""
    layer, tokens = layer_of(spec), rounded_up(tokens)
    planned = _planned(layer, spec.fp8, tokens, device)
    if (found := lookup(key_of(layer, tokens), device.fingerprint)) is None:
        return planned
    launch, seconds = found
    return Planned(launch, tokens, planned.bound, (("measured", seconds, planned.limit_seconds),))


def candidates(spec: Spec, tokens: int, device: Device, most: int = 12) -> list[Launch]:
    """Launches that are worth measuring, the model's own first.

    Args:
        spec: The layer.
        tokens: Of a call.
        device: Where it runs.
        most: How many at most.
    """
    layer, tokens = layer_of(spec), rounded_up(tokens)
    found = [_planned(layer, spec.fp8, tokens, device).launch]
    if not spec.fp8 and tokens <= _MOST_VECTORS:
        times = [vector_time(g, load_of(layer, tokens), device) for g in layer.gemms]
        found.append(Launch("gemv", times[0].tile, times[1].tile))
    found += [_launch(layer, choice, device) for choice in near(layer, load_of(layer, tokens), device, most)]
    return list(dict.fromkeys(found))[:most]


def tune(spec: Spec, tokens: int, device: Device, timer: Timer) -> Launch:
    """Measure the candidates on the device that is here, and keep the best for calls of so many tokens."""
    key = key_of(layer_of(spec), rounded_up(tokens))
    found = measure(candidates(spec, tokens, device), timer, key, device.fingerprint)
    return plan_launch(spec, tokens, device).launch if found is None else found[0]


@lru_cache(maxsize=4096)
def _planned(layer: Layer, fp8: bool, tokens: int, device: Device) -> Planned:
    choice = pick(layer, tokens, device)
    slots = tokens * layer.top_k
    steps = [(name, *part) for name, part in zip(("up", "down"), choice.parts, strict=True)]
    sorting = (1 if slots <= CHUNK else 3) * LAUNCH_SECONDS
    moved = (slots + tokens) * layer.width * ITEM_BYTES[layer.dtype] / device.target.memory_bandwidth
    tiled = (("sort", sorting, 0.0), *steps, ("combine", moved + LAUNCH_SECONDS, moved))
    if not fp8:
        times = [vector_time(g, load_of(layer, tokens), device) for g in layer.gemms]
        few = tuple((name, t.seconds, limit) for (name, _, limit), t in zip(steps, times, strict=True))
        if sum(t.seconds for t in times) < sum(seconds for _, seconds, _ in tiled):
            return Planned(Launch("gemv", times[0].tile, times[1].tile), tokens, choice.bound, few)
    return Planned(_launch(layer, choice, device), tokens, choice.bound, tiled)


def _launch(layer: Layer, choice: Choice, device: Device) -> Launch:
    tma = not layer.apart and isinstance(device.arch, int) and device.arch >= _TENSOR_MEMORY_ACCESS
    up, down = (replace(tile, tma=tma) for tile in (choice.up, choice.down))
    resident = [
        usage(device, tile, gemm.parts, gemm.dtype, gemm.biased, gemm.gathered, gemm.apart).resident
        for tile, gemm in zip((up, down), layer.of(down).gemms, strict=True)
    ]
    # Tiles of several heights are handed out one by one; programs that walk over them would not end together.
    return Launch("gemm", up, down, programs=device.units * max(resident) if up.units == 1 else 0)
