"""Memory for tensor descriptors: there in every thread, and no affair of the user's own allocator."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moec.backends.triton import launcher as launcher_module
from moec.backends.triton.kernels.text import Argument, Kernel, KernelFile
from moec.backends.triton.launcher import Launcher

pytest.importorskip("triton")


class Asking:
    """Stands for a kernel whose launch asks for memory."""

    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *a, **k: self.found.append(_ask())


def _ask() -> Any:
    from triton.runtime import _allocation

    return _allocation._allocator.get()(256, 128, None)


def _launcher(monkeypatch: pytest.MonkeyPatch, found: list[Any]) -> Launcher:
    kernel = Kernel("up", (Argument("x", "i32"),), ("TMA",), lambda tokens, constants: (1,))
    monkeypatch.setattr(launcher_module, "load_module", lambda text: SimpleNamespace(up=Asking(found)))
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: real(size, dtype=dtype))  # there is no GPU
    return Launcher(KernelFile("", {"up": kernel}))


def test_every_thread_has_memory_for_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    launcher = _launcher(monkeypatch, found)
    for _ in range(2):
        thread = threading.Thread(target=lambda: launcher("up", 1, {"x": 1}, {"TMA": 1}))
        thread.start()
        thread.join()
    launcher("up", 1, {"x": 1}, {"TMA": 1})
    assert [f.numel() for f in found] == [256] * 3


def test_the_users_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.runtime import _allocation

    found: list[Any] = []
    launcher, before = _launcher(monkeypatch, found), _allocation._allocator.get()
    try:
        triton.set_allocator(lambda size, align, stream: "theirs")
        launcher("up", 1, {"x": 1}, {"TMA": 1})
        assert _ask() == "theirs"
        launcher("up", 1, {"x": 1}, {"TMA": 0})
    finally:
        triton.set_allocator(before)
    assert isinstance(found[0], torch.Tensor)
    assert found[1] == "theirs"
