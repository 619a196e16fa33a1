"""Layers whose experts are timed are called as the kernel calls its own."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from moec.backends.distributed.kernel import ParallelKernel


@pytest.mark.parametrize("name", ["WorkingLayer", "AsleepLayer"])
@pytest.mark.parametrize("method", ["forward", "backward", "_experts", "_experts_backward"])
def test_what_is_timed_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    layer = getattr(importlib.import_module("overlap_layers"), name)
    own, of = (inspect.signature(getattr(kernel, method)).parameters for kernel in (layer, ParallelKernel))
    assert list(own) == list(of)
