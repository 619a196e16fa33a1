"""The kernel of one ``moe.route`` program: pointers of this call's tensors, and the compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from moec.backends.aten.region import compile_region
from moec.backends.base import Kernel
from moec.backends.cpu import team
from moec.backends.cpu.build import build
from moec.backends.cpu.isa import Isa
from moec.backends.cpu.load import Library
from moec.backends.cpu.memory import check_readable
from moec.backends.cpu.route_source import Router, write_router
from moec.backends.reference import AutogradKernel
from moec.ir.core import Graph
from moec.ir.torch_dtypes import TO_TORCH

_USES = {"softmax": ("exp",), "sigmoid": ("exp",), "identity": (), "sqrtsoftplus": ("exp", "log1p")}
"""Elementary functions of each scoring."""
SHARE = 16384
"""Logits that are worth a thread."""
NO_FUNCTIONS = "this build of torch does not show its vector exponential"


@lru_cache(maxsize=8)
def _torch_function(name: str) -> int:
    """Address of a vector function that torch was built with (SLEEF's); 0 where torch does not show it."""
    torch.get_num_threads()  # torch's libraries are loaded by now
    try:
        function = getattr(ctypes.CDLL("libtorch_cpu.so"), name)
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def functions(scoring: str, isa: Isa) -> tuple[int, int] | None:
    """Addresses of torch's exp and log1p on whole vectors, 0 where the scoring needs none; None if one is missing."""
    lanes = 8 if isa.name == "avx2" else 16
    found = [_torch_function(f"Sleef_{f}f{lanes}_u10") if f in _USES[scoring] else 0 for f in ("exp", "log1p")]
    return None if any(not found[i] for i in range(len(_USES[scoring]))) else (found[0], found[1])


class CpuRoute(Kernel):
    """Forward in generated C++; gradients are those of the definition, which takes few small ops.

    Attributes:
        threads: Of a call, where there is enough to do; 0 for as many as torch is set to.
    """

    def __init__(self, graph: Graph, router: Router, isa: Isa, functions: tuple[int, int], threads: int = 0) -> None:
        self.k, self.functions, self.threads = router.k, functions, threads
        self.dtype = TO_TORCH[router.out]
        self.bias = bool(router.bias)
        self.run = Library(build(write_router(router), isa)).entry("moec_route")
        definition = compile_region(graph)
        self.definition = AutogradKernel(lambda inputs: definition(*inputs))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        logits = inputs[0]
        bias = inputs[1] if self.bias else None
        if not all(t.is_cpu for t in inputs):
            check_readable(inputs)
        tokens, experts = logits.shape
        if experts > 1 and logits.stride(1) != 1:
            logits = logits.contiguous()
        if bias is not None and experts > 1 and bias.stride(0) != 1:
            bias = bias.contiguous()
        weights = logits.new_empty(tokens, self.k, dtype=self.dtype)
        ids = logits.new_empty(tokens, self.k, dtype=torch.int64)
        call = (
            logits.data_ptr(), logits.stride(0) * logits.element_size(), 0 if bias is None else bias.data_ptr(),
            weights.data_ptr(), ids.data_ptr(), tokens, *self.functions,
        )  # fmt: skip
        wanted = min(self.threads or torch.get_num_threads(), tokens * experts // SHARE)
        if wanted > 1:
            with team.SHARED.borrow(wanted) as threads:
                self.run((*call, threads))
        else:
            self.run((*call, 1))
        return [weights, ids]

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        return self.definition.backward(grads, inputs, needs)
