"""The triton backend: kernels for GPUs, generated as readable Python files."""

from __future__ import annotations

from moec.backends.base import Artifact, Backend, Kernel, StatusLine, Support, program_op
from moec.backends.calls import UnsupportedError
from moec.backends.registry import register_backend
from moec.backends.triton.fp8 import refusal
from moec.backends.triton.kernel import TritonExperts
from moec.backends.triton.kernels.route import read_router, write_router
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.module import INSTALL, interpreted, present, triton
from moec.backends.triton.route import TritonRoute
from moec.backends.triton.spec import read_spec
from moec.ir.core import Graph, Op
from moec.ir.types import TensorType

__all__ = ["TritonBackend"]

INTERPRET = "TRITON_INTERPRET=1 runs kernels on the CPU, slowly, in Triton's interpreter"


@register_backend
class TritonBackend(Backend):
    """Generates Triton kernels for one layer's sizes, types and activation, for NVIDIA and AMD GPUs.

    ``moe.experts`` sorts slots by expert and aligns them to row blocks on the device, gathers rows inside the up GEMM,
    whose epilogue is the traced activation, and adds up a token's rows in the order of its choices. Few tokens take
    kernels without sorting, one program for a slot and a stretch of columns. ``moe.route`` is one pass over the logits.
    Weights are read in place. Buffers and grids depend on the number of tokens alone and nothing waits for the device,
    so that a CUDA graph can capture a layer. Kernels are Python files in the cache directory. The extra ``triton`` must
    be installed. With ``TRITON_INTERPRET=1`` they run on tensors of the CPU, in Triton's interpreter. The backward's
    GEMMs run on the same sorted rows; what is between them is torch's. Experts that differ in their widths, routers
    that are regions, and row functions that cut up what they computed go to ``aten``. Weights in fp8 with scales are
    multiplied as they are from sm89 on; their gradients are those of ``aten``.
    """

    name = "triton"
    asynchronous = True

    def supports(self, op: Op, target: str) -> Support:
        if op.name not in ("moe.experts", "moe.route"):
            return Support.no(f"there is no kernel for {op.name}")
        if not present():
            return Support.no(f"Triton is not installed; {INSTALL}")
        for value in (*op.operands, *op.results):
            if not isinstance(value.type, TensorType):
                return Support.no(f"{value!r} is no tensor")
            if reason := _elsewhere(value.type.device, target):
                return Support.no(reason)
        try:
            if op.name == "moe.experts":
                x = op.operands[0].type
                assert isinstance(x, TensorType)
                if read_spec(op).fp8 and (reason := refusal(x.device, target)):
                    return Support.no(reason)
            else:
                read_router(op)
        except UnsupportedError as reason:
            return Support.no(str(reason))
        return Support.yes()

    def lower(self, graph: Graph, target: str) -> Artifact:
        op = program_op(graph)
        file = write_router(read_router(op)) if op.name == "moe.route" else write_experts(read_spec(op))
        return Artifact(self.name, target, graph, {"kernels.py": file.text.encode()})

    def load(self, artifact: Artifact) -> Kernel:
        op = program_op(artifact.graph)
        if op.name == "moe.route":
            return TritonRoute(artifact.graph, read_router(op))
        return TritonExperts(op, read_spec(op), artifact.target)

    def status(self) -> list[StatusLine]:
        import torch

        if not present():
            return [StatusLine(stage, False, INSTALL) for stage in ("emit", "build", "run")]
        version = f"Triton {triton().__version__}"
        if interpreted():
            return [
                StatusLine("emit", True, "Python"),
                StatusLine("build", True, "nothing to build: TRITON_INTERPRET is set"),
                StatusLine("run", True, f"{version}'s interpreter, on the CPU"),
            ]
        there = torch.cuda.is_available()
        return [
            StatusLine("emit", True, "Python"),
            StatusLine("build", True, version),
            StatusLine(
                "run", there, torch.cuda.get_device_name() if there else f"this machine has no GPU; {INTERPRET}"
            ),
        ]


def _elsewhere(device: str, target: str) -> str:
    """Why kernels cannot run on tensors of ``device``; empty where they can."""
    kind = device.partition(":")[0]
    if kind == "cuda" or (kind == "cpu" and (interpreted() or not target.startswith("cpu"))):
        return ""
    return f"its operands are on {device}" + (f"; {INTERPRET}" if kind == "cpu" else "")
