"""Worker processes that measure families: a crash or an endless loop costs one row, never the table."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from moec.coverage.families import Family
from moec.coverage.row import Row

TIME_LIMIT = 120.0
"""Seconds a family may take."""
_START_LIMIT = 120.0
"""Seconds more for the first family of a process, which imports torch and transformers."""


class WorkerError(Exception):
    """The worker is gone; the message says how."""


class Worker:
    """One process of ``moec.coverage.worker``, started when first asked."""

    def __init__(self, backends: Sequence[str]) -> None:
        self._backends = list(backends)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def ask(self, family: Family, limit: float) -> Row:
        """Measure one family. Where the process dies or takes too long, the row has what it had told until then."""
        row = Row(family.name, bool(family.decorated))
        fresh = self._process is None
        try:
            self._send({"family": family.to_dict(), "backends": self._backends})
            deadline = _Deadline(limit + (_START_LIMIT if fresh else 0.0))
            while "row" in (answer := self._next(deadline)):
                row = Row.from_dict(answer["row"])
        except WorkerError as e:
            row.reasons.append(str(e))
            self.close()
        return row

    def close(self) -> None:
        """End the process and what it has started, such as a C++ compiler."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(_death(process)) from None

    def _start(self) -> subprocess.Popen[str]:
        self._answers = queue.Queue()
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "moec.coverage.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        threading.Thread(target=_read, args=(process, self._answers), daemon=True).start()
        return process

    def _next(self, deadline: _Deadline) -> dict[str, Any]:
        assert self._process is not None
        try:
            answer = self._answers.get(timeout=deadline.left())
        except queue.Empty:
            raise WorkerError(f"stopped: it took more than {deadline.seconds:.0f} seconds") from None
        if answer is None:
            raise WorkerError(_death(self._process))
        return answer


class _Deadline:
    """A moment in the future."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.001)


def _read(process: subprocess.Popen[str], answers: queue.Queue[dict[str, Any] | None]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # closed while reading
        for line in process.stdout:
            answers.put(json.loads(line))
    answers.put(None)


def _death(process: subprocess.Popen[str]) -> str:
    code = process.wait()
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def measure_all(
    families: Sequence[Family],
    *,
    jobs: int = 2,
    backends: Sequence[str] = ("cpu", "aten"),
    limit: float = TIME_LIMIT,
    on_start: Callable[[Family], None] = lambda _: None,
    on_row: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """The rows of families, in their order.

    Args:
        families: Which.
        jobs: Worker processes, of one thread each.
        backends: Which of moec's backends may claim ops.
        limit: Seconds a family may take.
        on_start: Told when a family's turn comes; called from other threads.
        on_row: Told every row once it is complete; called from other threads.
    """
    todo: queue.SimpleQueue[Family] = queue.SimpleQueue()
    for family in families:
        todo.put(family)
    rows: dict[str, Row] = {}
    workers = [Worker(backends) for _ in range(min(jobs, len(families)))]
    stop = threading.Event()

    def work(worker: Worker) -> None:
        while not stop.is_set():
            try:
                family = todo.get_nowait()
            except queue.Empty:
                return
            on_start(family)
            rows[family.name] = row = worker.ask(family, limit)
            on_row(row)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for worker in workers:
            worker.close()
    return [rows[f.name] for f in families if f.name in rows]
