"""Compiling many kernels: this process and others take them from one queue.

Most of a compile is Python and holds the interpreter's lock, so threads gain nothing. A process more costs the import
of Torch and Triton; none is started while what is asked for comes out of the cache.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from moec.backends.triton.compiled.cross import Binary, compile_kernel
from moec.backends.triton.compiled.plan import Call
from moec.backends.triton.launches.device import Device
from moec.backends.triton.module import load_module

_UNKNOWN_SECONDS = 0.25
"""What takes longer did not come out of the cache."""
_WORTH = 3
"""Kernels for each process more, or it is not worth its start."""
_WAIT_SECONDS = 0.02
_COMMAND = "from moec.backends.triton.compiled.pool import main; main()"


@dataclass(frozen=True)
class Job:
    """A kernel to compile: the launch it is for, the text of its file, and types and constants in order."""

    call: Call
    text: str
    signature: tuple[tuple[str, str], ...]
    device: Device


def compile_job(job: Job) -> Binary:
    """Compile one kernel in this process.

    Raises:
        CrossError: Triton refuses it.
    """
    call = job.call
    function = getattr(load_module(job.text), call.kernel)
    return compile_kernel(
        function, dict(job.signature), dict(call.constants), job.device,
        warps=call.warps, stages=call.stages, aligned=call.aligned,
    )  # fmt: skip


def compile_jobs(
    jobs: Sequence[Job], processes: int = 1, told: Callable[[int], None] = lambda done: None
) -> list[Binary]:
    """Compile kernels; the same ones come back whoever compiles them.

    Args:
        jobs: The kernels.
        processes: Compile at once, this one among them.
        told: Hears how many are done.

    Raises:
        CrossError: Triton refuses one. Nothing further is compiled then.
    """
    left = deque(enumerate(jobs))
    made: dict[int, Binary] = {}
    workers: list[_Worker] = []
    try:
        while len(made) < len(jobs):
            taken = _take(left)
            if taken is None:  # the last ones are under way
                time.sleep(_WAIT_SECONDS)
            else:
                begin = time.perf_counter()
                made[taken[0]] = compile_job(taken[1])
                if not workers and time.perf_counter() - begin > _UNKNOWN_SECONDS:
                    workers = [_Worker(left, made) for _ in range(min(processes - 1, len(left) // _WORTH))]
            told(len(made))
    finally:
        for worker in workers:
            worker.close()
    return [made[i] for i in range(len(jobs))]


def _take(jobs: deque[tuple[int, Job]]) -> tuple[int, Job] | None:
    """The next job and its number, if there is one."""
    try:
        return jobs.popleft()
    except IndexError:
        return None


class _Worker:
    """A process, and the thread that hands it jobs once it has started.

    A process that ends, whatever it meets, gives its job back: the one that waits for it then meets the same.
    """

    def __init__(self, jobs: deque[tuple[int, Job]], made: dict[int, Binary]) -> None:
        self._jobs, self._made = jobs, made
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _serve(self) -> None:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None and back is not None
        taken = None
        try:
            pickle.load(back)  # it has started
            while (taken := _take(self._jobs)) is not None:
                pickle.dump(taken[1], to)
                to.flush()
                self._made[taken[0]] = pickle.load(back)
        except (EOFError, OSError, pickle.UnpicklingError):
            if taken is not None:
                self._jobs.appendleft(taken)


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Compile what comes in until ``jobs`` ends.

    Raises:
        MoecError: A kernel cannot be compiled.
    """
    answer: object = "ready"
    while True:
        pickle.dump(answer, answers)
        answers.flush()
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        answer = compile_job(job)


def main() -> None:
    """A process of :func:`compile_jobs`. What compilers print must not be taken for an answer."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, answers)
