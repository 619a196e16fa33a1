"""Experts that are a dictionary of small modules, two linear layers each: what families with such experts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from moec.readiness.rewriters.canonical import Projection

LINEAR = "torch.nn.modules.linear.Linear"
DROPOUT = "torch.nn.modules.dropout.Dropout"


def listed(experts: Any, count: int) -> list[Any]:
    """The first ``count`` experts, in the order of their numbers."""
    return [experts[f"expert_{i}"] for i in range(count)]


def projection(layers: Sequence[nn.Linear]) -> Projection:
    """The same linear layer of every expert."""
    return Projection([layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None])


def drops_out(experts: Sequence[Any]) -> bool:
    """True if some expert drops out elements between its layers while training."""
    return any(expert.dropout.p > 0 for expert in experts)


def activation(expert: Any, down: nn.Linear) -> Callable[[Tensor], Tensor]:
    """What every expert does between its layers when it does not drop out; ``expert`` and ``down`` are one of them.

    Some checkpoints keep the down projection in f32: the rows then follow its type.
    """
    return lambda h: expert.act(h).to(down.weight.dtype)


def unlike(experts: Sequence[Any], up: str, down: str) -> str | None:
    """Why the experts cannot be run as one, or None.

    Args:
        experts: All of them.
        up: Name of the first linear layer.
        down: Name of the second one.
    """
    first = experts[0]
    for name in (up, down):
        layers = [getattr(e, name) for e in experts]
        kinds = {(tuple(la.weight.shape), la.weight.dtype, la.bias is None) for la in layers}
        if len(kinds) > 1:
            return f"the layers {name} of its experts differ in shape, type or bias"
        if not layers[0].weight.is_floating_point():
            return f"the layers {name} of its experts are quantized"
    if any(type(e.act) is not type(first.act) or any(True for _ in e.act.parameters()) for e in experts):
        return "its experts have different activations, or weights in them"
    return None
