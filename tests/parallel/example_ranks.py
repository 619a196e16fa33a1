"""What each process of ``test_example.py`` does: the example, on a store of its own."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from examples import expert_parallel


def _main(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=90))
    try:
        found = expert_parallel.main(Path(folder), **expert_parallel.QUICK)
    except Exception:  # noqa: BLE001  (the failure is the result: the test shows it)
        found = {"error": {"text": traceback.format_exc()}}
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)


def four(rank: int, folder: str) -> None:
    """One of four."""
    _main(rank, folder, 4)


def two(rank: int, folder: str) -> None:
    """One of two."""
    _main(rank, folder, 2)
