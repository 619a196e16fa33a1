"""What a spawned rank does around its test: a group on gloo before, and what it found into a file after."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_gloo(rank: int, folder: str, ranks: int, work: Callable[[], dict[str, Any]], seconds: float = 90) -> None:
    """Save what ``work`` finds as ``<rank>.pt``, where ``run_processes`` looks for it, and end the process.

    Args:
        rank: Of this process.
        folder: Of the test; the ranks meet in a file there.
        ranks: How many.
        work: Run in a group of all ranks. A failure is a result, too: ``{"error": traceback}``.
        seconds: How long a collective may take.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    try:
        found = work()
    except Exception:  # noqa: BLE001  (the test shows it)
        found = {"error": traceback.format_exc()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)
