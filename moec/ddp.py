"""Graphs that Dynamo cuts at DistributedDataParallel's gradient buckets before a backend sees them.

``torch._dynamo.config.optimize_ddp`` (on by default) splits a model's graph so that gradients are reduced while the
backward still runs. It cuts wherever a bucket is full; an expert layer's weights fill many buckets, so a MoE block is
cut between its GEMMs and no piece holds all of it.
"""

from __future__ import annotations

import torch

from moec.passes.raise_moe.refusal import LONE
from moec.report import Report

CUT = (
    "MoE blocks run as PyTorch would run them: it cuts graphs at the gradient buckets of DistributedDataParallel, here "
    "between a block's expert GEMMs. torch._dynamo.config.optimize_ddp = False before the first call keeps blocks "
    "whole (gradients are then reduced after a graph's backward); fully_shard needs no such setting"
)


def cuts_graphs() -> bool:
    """True while what Dynamo hands over may be a piece of a graph cut for DDP."""
    if torch._dynamo.config.optimize_ddp not in (True, "ddp_optimizer") or not torch.distributed.is_available():
        return False
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module() is not None


def explain(report: Report) -> None:
    """Give the blocks of one piece that show a single expert GEMM the reason for it."""
    for block in report.layers:
        if block.reason == LONE:
            block.reason = CUT
