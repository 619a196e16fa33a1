"""The distributed backend: layers whose experts lie on several ranks, over torch.distributed."""

from __future__ import annotations

import torch.distributed as dist

from moec.backends.base import Artifact, Backend, Kernel, StatusLine, Support, program_op, tensors_only
from moec.backends.distributed.kernel import ParallelKernel
from moec.backends.registry import register_backend
from moec.ir.core import Op

__all__ = ["DistributedBackend"]


@register_backend
class DistributedBackend(Backend):
    """Runs ``moe.parallel_experts`` over torch.distributed, with gloo, NCCL, HCCL or any other process group.

    It is asked by itself, whatever the order given: another backend of that order runs the experts of a rank. Rows come
    home uncombined and are added as that backend adds them, so a layer has the bits of one process that holds all
    experts, if the backend gives a row the same bits whatever other rows lie beside it (``cpu`` promises that). Sums
    over ranks are taken in order of ranks. A rank that dies or hangs is named on all others.
    """

    name = "distributed"

    def supports(self, op: Op, target: str) -> Support:
        if op.name not in ("moe.parallel_experts", "moe.begin"):
            return Support.no(f"it runs layers that are spread over ranks, not {op.name}")
        if not dist.is_available():
            return Support.no("this build of torch has no torch.distributed")
        if op.name == "moe.begin":
            return Support.yes()
        return tensors_only(op)

    def load(self, artifact: Artifact) -> Kernel:
        return ParallelKernel(program_op(artifact.graph), artifact.target)

    def status(self) -> list[StatusLine]:
        works = dist.is_available()
        here = [k for k in ("gloo", "nccl", "mpi") if works and getattr(dist, f"is_{k}_available")()]
        none = "this build of torch has no torch.distributed"
        detail = f"torch.distributed with {', '.join(here)}" if works else none
        return [
            StatusLine("emit", True, "the IR itself"),
            StatusLine("build", True, "nothing to build"),
            StatusLine("run", works, detail),
        ]
