"""Kernels that several processes compile: each once, in order, whoever dies."""

from __future__ import annotations

import io
import pickle
import time
from typing import Any

import pytest

from moec.backends.base import program_op
from moec.backends.triton.compiled import pool
from moec.backends.triton.compiled.built import plan_route
from moec.backends.triton.compiled.cross import refusal
from moec.backends.triton.compiled.pool import Job, compile_jobs, serve
from moec.backends.triton.launches.device import device_of
from moec.ir.errors import MoecError
from moec.ir.parser import parse_graph
from tests.backends.triton.test_triton_compile import ROUTER

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal() or "")

ANSWERS = """
import pickle, sys
answer, out = "ready", sys.stdout.buffer


class Anything:
    def __new__(cls, *given):
        return object.__new__(cls)

    def __setstate__(self, state):
        pass


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return Anything


for left in range({most}, -1, -1):
    if not left:
        break
    pickle.dump(answer, out)
    out.flush()
    try:
        Unpickler(sys.stdin.buffer).load()
    except EOFError:
        break
    answer = "another process"
"""
"""A process that answers jobs without looking at them, and ends after so many."""


@pytest.fixture
def jobs() -> list[Job]:
    return plan_route(program_op(parse_graph(ROUTER)), device_of("cuda:sm80"), 64).jobs() * 12


def compiled(jobs: list[Job], monkeypatch: pytest.MonkeyPatch, most: int, seconds: float = 0.3) -> list[Any]:
    """What comes of it where this process takes so long for a kernel, and the other gives up after ``most``."""

    def slowly(job: Job) -> Any:
        time.sleep(seconds)
        return "this process"

    monkeypatch.setattr(pool, "compile_job", slowly)
    monkeypatch.setattr(pool, "_COMMAND", ANSWERS.format(most=most))
    heard: list[int] = []
    made: list[Any] = compile_jobs(jobs, 2, heard.append)
    assert heard[-1] == len(made) == len(jobs)
    assert heard == sorted(heard)
    return made


def test_another_process_takes_its_share(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(jobs, monkeypatch, len(jobs))
    assert made[0] == "this process"
    assert made.count("another process") >= 3


def test_what_a_process_leaves_is_compiled_here(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(jobs[:5], monkeypatch, 2)
    assert made.count("another process") == 1  # the answer to the second never came
    assert made.count("this process") == 4


def test_nobody_is_started_for_what_is_in_the_cache(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(jobs, monkeypatch, len(jobs), seconds=0)
    assert set(made) == {"this process"}


def test_one_that_cannot_be_compiled_ends_it(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(job: Job) -> Any:
        raise MoecError("no")

    monkeypatch.setattr(pool, "compile_job", refuses)
    with pytest.raises(MoecError, match="no"):
        compile_jobs(jobs)


def test_a_process_gives_what_this_one_compiles(jobs: list[Job]) -> None:
    given = io.BytesIO(pickle.dumps(jobs[0]))
    answers = io.BytesIO()
    serve(given, answers)
    answers.seek(0)
    assert pickle.load(answers) == "ready"
    assert pickle.load(answers) == pool.compile_job(jobs[0])
