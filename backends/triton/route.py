"""The kernel of one ``moe.route`` program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moec.backends.aten.region import compile_region
from moec.backends.base import Kernel
from moec.backends.reference import AutogradKernel
from moec.backends.triton.kernels.route import Router, write_router
from moec.backends.triton.launcher import Launcher, LaunchKernel, on_device_of
from moec.backends.triton.module import interpreted
from moec.ir.core import Graph
from moec.ir.torch_dtypes import TO_TORCH

ELEMENTS = 2048
"""Scores that a program holds, about."""
MOST_TOKENS = 16
"""Tokens of a program."""


def tokens_of_a_program(router: Router) -> int:
    """BLOCK_T: a power of two."""
    return max(1, min(MOST_TOKENS, ELEMENTS // router.columns))


class TritonRoute(Kernel):
    """Forward in generated Triton; gradients are those of the definition, which takes few small ops."""

    def __init__(self, graph: Graph, router: Router, launcher: LaunchKernel | None = None) -> None:
        self.router = router
        self.dtype = TO_TORCH[router.out]
        self.launcher = launcher or Launcher(write_router(router, interpreted()))
        definition = compile_region(graph)
        self.definition = AutogradKernel(lambda inputs: definition(*inputs))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        logits, r = inputs[0], self.router
        tokens = logits.shape[0]
        weights = logits.new_empty(tokens, r.k, dtype=self.dtype)
        ids = logits.new_empty(tokens, r.k, dtype=torch.int64)
        if not tokens:
            return [weights, ids]
        if r.experts > 1 and logits.stride(1) != 1:
            logits = logits.contiguous()
        values = {"logits": logits, "logits_s": logits.stride(0), "weights": weights, "ids": ids, "tokens": tokens}
        if r.bias:
            values["bias"] = inputs[1].contiguous()
        with on_device_of(logits):
            self.launcher("route", tokens, values, {"BLOCK_T": tokens_of_a_program(r)})
        return [weights, ids]

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        return self.definition.backward(grads, inputs, needs)
