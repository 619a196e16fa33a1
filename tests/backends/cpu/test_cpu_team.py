"""Threads of a call: as many as are free, none beyond the cores; and working memory that calls hand on."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from moec.backends.cpu import CpuBackend
from moec.backends.cpu.build import compiler
from moec.backends.cpu.isa import LEVELS, missing
from moec.backends.cpu.kernel import CpuExperts
from moec.backends.cpu.team import Cores, threads_of
from moec.backends.cpu.workspace import KEPT_BYTES, Workspace
from tests.backends.cases import ExpertsCase


def test_a_call_alone_gets_what_it_wants() -> None:
    cores = Cores(2)
    for wanted in (1, 2, 5):
        with cores.borrow(wanted) as got:
            assert got == wanted
    assert cores.busy == 0


def test_calls_at_once_share_the_cores() -> None:
    cores = Cores(3)
    with cores.borrow(2) as first, cores.borrow(2) as second:
        assert (first, second) == (2, 1)
    with pytest.raises(ZeroDivisionError), cores.borrow(3):
        _ = 1 / 0
    assert cores.busy == 0


def test_who_finds_no_core_waits() -> None:
    cores, most, now = Cores(2), [0], [0]
    lock = threading.Lock()

    def work() -> None:
        with cores.borrow(1):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.01)
            with lock:
                now[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=20)
    assert cores.busy == 0
    assert most[0] == 2


def test_the_number_of_threads_comes_with_the_target() -> None:
    assert threads_of("cpu:avx2,cores=3") == 3
    assert threads_of("cpu") == 0


@pytest.mark.skipif(compiler() is None or bool(missing(LEVELS["avx2"])), reason="no C++ compiler, or no AVX2")
def test_a_kernel_keeps_its_number_of_threads() -> None:
    case, backend = ExpertsCase(), CpuBackend()
    kernels = [backend.load(backend.lower(case.graph(), t)) for t in ("cpu,cores=1", "cpu,cores=2")]
    assert [k.threads for k in kernels if isinstance(k, CpuExperts)] == [1, 2]
    inputs = case.inputs(20)
    assert torch.equal(kernels[0].forward(inputs)[0], kernels[1].forward(inputs)[0])


def test_small_buffers_are_kept_and_large_ones_are_not() -> None:
    space = Workspace()
    first = space.take(1000)
    other = space.take(1000)
    assert other.data_ptr() != first.data_ptr()
    space.give_back(first)
    assert space.take(500).data_ptr() == first.data_ptr()
    space.give_back(first)
    assert space.take(2000).numel() >= 2000
    large = space.take(KEPT_BYTES + 1)
    space.give_back(large)
    space.give_back(other)
    assert space.take(10).data_ptr() == other.data_ptr()
