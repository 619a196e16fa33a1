"""Starting ranks as processes, of which none outlives the test."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def run_processes(
    main: Callable[[int, str], None], ranks: int, folder: Path, deadline: float, lost: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Run ``main(rank, folder)`` as ``ranks`` processes; what each wrote to ``<rank>.pt``.

    Args:
        main: Importable by name.
        ranks: How many.
        folder: Of the test.
        deadline: Seconds for all of them.
        lost: Ranks that are meant to die.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=main, args=(i, str(folder)), daemon=True) for i in range(ranks)]
        for process in processes:
            process.start()
    end = time.monotonic() + deadline
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    found = [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(ranks)]
    assert None not in codes, f"ranks were still running after {deadline} s: {codes}; done: {list(found[0])}"
    assert [c for i, c in enumerate(codes) if i not in lost] == [0] * (ranks - len(lost))
    return found
