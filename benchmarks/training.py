"""One training step of a whole model: forward, backward, and SGD in place.

A step meets memory as its own last step left it, so each variant takes two in a row and the second one is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turns import Task, largest_difference

RATE = 1e-7  # so small that every step of a measurement meets the same weights


def training_task(models: dict[str, Any], tokens: int, vocabulary: int) -> Task:
    """A step on one sequence; gradients of a router and of one expert are compared with eager's.

    Args:
        models: By variant, all on the same parameters.
        tokens: Length of the sequence.
        vocabulary: Its tokens are drawn from.
    """
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    block = models["eager"].model.layers[0].mlp

    def look(_: Any) -> Tensor:
        parts = (block.gate.weight.grad, block.experts.down_proj.grad[0])
        return torch.cat([p.flatten() / p.abs().max().clamp(min=1e-30) for p in parts])

    return Task(
        f"training step of {tokens}",
        tokens,
        {name: _step(model, ids) for name, model in models.items()},
        look,
        largest_difference,
        lead=1,
    )


def _step(model: Any, ids: Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss

    return run
