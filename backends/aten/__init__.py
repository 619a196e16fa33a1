"""The aten backend: every MoE op with PyTorch's own operations, on any device. The last in every claim order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from moec.backends.aten.backward import experts_backward
from moec.backends.aten.forward import experts_forward
from moec.backends.aten.region import compile_region
from moec.backends.aten.spec import Spec
from moec.backends.base import (
    Artifact,
    Backend,
    Kernel,
    PlacingKernel,
    StatusLine,
    Support,
    placed,
    program_op,
    tensors_only,
)
from moec.backends.reference import AutogradKernel, run_graph
from moec.backends.registry import register_backend
from moec.ir.core import Op
from moec.ir.types import TensorType

__all__ = ["AtenBackend"]

FLOATS = ("f32", "bf16", "f16", "f64")


class ExpertsKernel(PlacingKernel):
    """``moe.experts``: see ``forward.py`` and ``backward.py``; weights in fp8 are multiplied as the definition says."""

    def __init__(self, op: Op) -> None:
        self.spec = Spec.of(op)
        assert op.parent is not None
        self.defined = AutogradKernel(partial(run_graph, op.parent)) if op.group("up_scale") else None

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        if self.defined is not None:
            return self.defined.forward(inputs)
        return [experts_forward(self.spec, inputs)]

    def backward_into(
        self,
        grads: Sequence[Tensor | None],
        inputs: list[Tensor],
        needs: Sequence[bool],
        into: Sequence[Tensor | None],
        only: Sequence[int] | None = None,
    ) -> list[Tensor | None]:
        if self.defined is not None:
            return placed(self.defined.backward(grads, inputs, needs), into, only)
        (grad,) = grads
        if grad is None:
            found = [torch.zeros_like(t) if n else None for t, n in zip(inputs, needs, strict=True)]
            return placed(found, into, only)
        return experts_backward(self.spec, grad, inputs, needs, into, only)


@register_backend
class AtenBackend(Backend):
    """Runs MoE ops with PyTorch's own operations, forward and backward, on any device.

    ``moe.experts`` sorts the tokens by expert and calls one GEMM per touched expert and projection, on the weights
    where they lie; its backward recomputes the up GEMM and the activation. ``moe.route`` calls the operations of its
    definition, ``moe.regroup`` plans with NumPy, on the processor. Weights in fp8 with scales are multiplied as what
    they stand for, one expert at a time in f32, on any device. Results do not depend on the number of threads
    beyond what torch's own operations do.
    """

    name = "aten"

    def supports(self, op: Op, target: str) -> Support:
        if op.name not in ("moe.route", "moe.experts", "moe.regroup"):
            return Support.no(f"there is no kernel for {op.name}")
        if op.name == "moe.experts":
            weights = () if op.group("up_scale") else (*op.group("up"), *op.group("down"))
            gemms = (op.operands[0], *weights)
            for value in gemms:
                if isinstance(value.type, TensorType) and value.type.dtype.name not in FLOATS:
                    return Support.no(f"GEMMs in {value.type.dtype} ({value!r}); supported are {', '.join(FLOATS)}")
            types = {v.type.dtype.name for v in gemms if isinstance(v.type, TensorType)}
            if len(types) > 1:
                return Support.no(f"GEMMs of mixed types: tokens and weights are {', '.join(sorted(types))}")
        return tensors_only(op)

    def load(self, artifact: Artifact) -> Kernel:
        op = program_op(artifact.graph)
        if op.name == "moe.experts":
            return ExpertsKernel(op)
        if op.name == "moe.regroup":
            return AutogradKernel(partial(run_graph, artifact.graph))
        # A router is a handful of small ops: its region, or its definition, is its kernel.
        router = compile_region(op.regions[0] if op.regions else artifact.graph)
        return AutogradKernel(lambda inputs: router(*inputs))

    def status(self) -> list[StatusLine]:
        return [
            StatusLine("emit", True, "the IR itself"),
            StatusLine("build", True, "nothing to build"),
            StatusLine("run", True, f"torch {torch.__version__}, {torch.get_num_threads()} threads, any device"),
        ]
