"""Links between processes of this machine: all-to-alls over gloo, timed by processes made for it.

``python -m moec.calibration.links FILE RANK RANKS`` is one of them. They meet in FILE, so no port is taken, and rank 0
prints what :func:`moec.parallel.costs.measure` says, which is also what ranks of a model measure for themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from moec.cost import ProfileError
from moec.cost.links import Link

_DEADLINE = 120.0
"""Seconds for all processes of a measurement; importing torch is most of what they do."""


def measure_links(ranks: int) -> Link:
    """Latency and bandwidth between ``ranks`` processes, each with one thread; some seconds.

    Raises:
        ProfileError: They could not talk to each other.
    """
    environment = {"GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="moec-links-") as folder:
        words = [sys.executable, "-m", "moec.calibration.links", str(Path(folder) / "store")]
        started = [
            subprocess.Popen(
                [*words, str(rank), str(ranks)], env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        try:
            end = time.monotonic() + _DEADLINE
            told = [p.communicate(timeout=max(0.0, end - time.monotonic())) for p in started]
        except subprocess.TimeoutExpired as e:
            raise ProfileError(f"{ranks} processes did not measure their links in {_DEADLINE:.0f} s") from e
        finally:
            for process in started:
                process.kill()
                process.wait()
    for process, (_, said) in zip(started, told, strict=True):
        if process.returncode:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise ProfileError(f"links between processes could not be measured: {last}")
    alpha_s, bytes_per_s = json.loads(told[0][0])
    return Link(alpha_s, bytes_per_s)


def _main(store: str, rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist

    from moec.parallel.costs import measure

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(seconds=_DEADLINE)
    )
    link, _ = measure(dist.group.WORLD, "cpu")
    if rank == 0:
        print(json.dumps([link.alpha_s, link.bytes_per_s]))
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
