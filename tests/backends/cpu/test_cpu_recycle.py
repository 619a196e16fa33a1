"""Memory of gradients goes round, and never while somebody can still see it."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from torch import Tensor

from moec.backends.cpu.recycle import FROM_BYTES, Recycler

ROWS = FROM_BYTES // 1024


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(ROWS, 512, dtype=dtype)


def test_memory_that_nobody_holds_is_used_again() -> None:
    pool = Recycler()
    first = pool.empty_like(weight())
    where = first.data_ptr()
    del first
    assert pool.idle_bytes() == ROWS * 512 * 4
    assert pool.empty_like(weight()).data_ptr() == where
    pool.empty_like(torch.zeros(ROWS * 2, 512, dtype=torch.bfloat16)).fill_(1)  # as many bytes
    assert pool.idle_bytes() == ROWS * 512 * 4


@pytest.mark.parametrize("hold", [lambda t: t, lambda t: t[3:], lambda t: t.detach().t(), lambda t: t.numpy()])
def test_memory_that_somebody_holds_is_left_alone(hold: object) -> None:
    pool = Recycler()
    first = pool.empty_like(weight()).fill_(7)
    held = hold(first)  # type: ignore[operator]
    del first
    gc.collect()
    second = pool.empty_like(weight()).fill_(8)
    assert pool.idle_bytes() == 0
    assert bool((torch.as_tensor(held) == 7).all()) and bool((second == 8).all())


@pytest.mark.parametrize(
    "like",
    [
        weight(),
        weight(torch.bfloat16).t(),
        torch.zeros(4, ROWS, 512).transpose(1, 2),
        torch.zeros(2 * ROWS, 1024)[:, ::2],
    ],
)
def test_shapes_strides_and_dtypes_are_those_of_empty_like(like: Tensor) -> None:
    made, reference = Recycler().empty_like(like), torch.empty_like(like)
    assert (made.shape, made.stride(), made.dtype) == (reference.shape, reference.stride(), reference.dtype)
    assert made.is_set_to(made.view_as(made)) and made._base is None
    assert bool((made.fill_(3) == 3).all())


def test_small_ones_are_the_allocators_business() -> None:
    pool = Recycler()
    del (small := [pool.empty_like(torch.zeros(1000))])[:]
    assert small == [] and pool.idle_bytes() == 0


def test_what_nobody_asks_for_goes_back_to_the_system() -> None:
    pool = Recycler(idle_s=0.2)
    pool.empty_like(weight())
    assert pool.idle_bytes()
    deadline = time.monotonic() + 10
    while pool.idle_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pool.idle_bytes() == 0


def test_threads_never_get_the_same_memory() -> None:
    pool, wrong = Recycler(idle_s=0.01), []

    def steps(value: int) -> None:
        for _ in range(50):
            mine = [pool.empty_like(weight()).fill_(value) for _ in range(3)]
            wrong.extend(m for m in mine if not bool((m == value).all()))

    threads = [threading.Thread(target=steps, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
