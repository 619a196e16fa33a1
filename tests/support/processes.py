"""Starting ranks as processes, of which none outlives the test."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def run_processes(
    main: Callable[[int, str], None], ranks: int, folder: Path, deadline: float, lost: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Run ``main(rank, folder)`` as ``ranks`` processes; what each wrote to ``<rank>.pt``.

    They are forks of one process, which has imported what they need: most of a rank's time would else be imports.

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
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pools of processes under the ranks
        parent = multiprocessing.get_context("spawn").Process(target=_fork, args=(main, ranks, str(folder)))
        parent.start()
    assert parent.pid is not None
    try:
        parent.join(deadline)
        over = parent.exitcode is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.kill()  # it may not have made itself a group yet
        parent.join()
    found = [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(ranks)]
    assert not over, f"ranks were still running after {deadline} s; done: {list(found[0])}"
    codes = torch.load(folder / "codes.pt")
    assert [c for i, c in enumerate(codes) if i not in lost] == [0] * (ranks - len(lost))
    return found


def _fork(main: Callable[[int, str], None], ranks: int, folder: str) -> None:
    """Become the parent of all ranks, and wait for them."""
    os.setpgrp()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # Dynamo imports much of itself when it first runs
    torch._dynamo.reset()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=main, args=(i, folder)) for i in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    torch.save([process.exitcode for process in processes], Path(folder) / "codes.pt")
