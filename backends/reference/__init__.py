"""The reference backend: the meaning of every op, executed as written. Slow on purpose; the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from moec.backends.base import Artifact, Backend, Kernel, StatusLine, Support, tensors_only
from moec.backends.reference.interpreter import run_graph
from moec.backends.registry import register_backend
from moec.ir.core import Op
from moec.ir.opdef import OpDef, op_def

__all__ = ["AutogradKernel", "ReferenceBackend", "run_graph"]


class AutogradKernel(Kernel):
    """Runs a function of the flat operands; its backward is torch's autograd through that function, run again."""

    def __init__(self, run: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        self.run = run

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.run(inputs)

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        with torch.enable_grad():
            outputs = self.run(leaves)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [t for t, n in zip(leaves, needs, strict=True) if n]
        if not pairs or not wanted:
            return [torch.zeros_like(t) if n else None for t, n in zip(inputs, needs, strict=True)]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True
            )
        )
        return [next(found) if n else None for n in needs]


@register_backend
class ReferenceBackend(Backend):
    """Executes an op by its definition (``OpDef.evaluate``) with plain torch operations, on any device.

    It takes every op on tensors that has an executable meaning. Use it to check another backend, not to be fast.
    """

    name = "reference"

    def supports(self, op: Op, target: str) -> Support:
        if type(op_def(op.name)).evaluate is OpDef.evaluate:
            return Support.no(f"{op.name} has no executable meaning")
        return tensors_only(op)

    def load(self, artifact: Artifact) -> Kernel:
        return AutogradKernel(partial(run_graph, artifact.graph))

    def status(self) -> list[StatusLine]:
        return [
            StatusLine("emit", True, "the IR itself"),
            StatusLine("build", True, "nothing to build"),
            StatusLine("run", True, f"torch {torch.__version__}, any device"),
        ]
