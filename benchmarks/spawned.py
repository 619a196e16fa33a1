"""Starting the ranks of a benchmark as processes."""

from __future__ import annotations

import argparse
import multiprocessing
import socket
from collections.abc import Callable

Main = Callable[[int, int, argparse.Namespace], None]


def run_ranks(main: Main, ranks: int, args: argparse.Namespace) -> None:
    """Run ``main(rank, port, args)`` as so many processes, which meet at a free port of this machine.

    Raises:
        SystemExit: A rank failed.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=main, args=(rank, port, args), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed")
