"""What the triton backend takes and refuses, and what it says where something is missing."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import mock

import pytest

from moec.backends.base import program_op
from moec.backends.registry import get_backend
from moec.backends.triton import module
from moec.ir.types import TensorType
from tests.backends.cases import ExpertsCase, route_graph
from tests.support.interpreter import interpreting

BACKEND = get_backend("triton")


def _reason(case: ExpertsCase, target: str = "cuda:sm90") -> str:
    return BACKEND.supports(program_op(case.graph()), target).reason


def test_a_gpu_target_needs_no_gpu() -> None:
    pytest.importorskip("triton")
    graph = ExpertsCase().graph()
    assert _reason(ExpertsCase()) == ""
    artifact = BACKEND.lower(graph, "cuda:sm90")
    text = artifact.files["kernels.py"].decode()
    assert "def up(" in text
    assert artifact.files == BACKEND.lower(ExpertsCase().graph(), "cuda:sm90").files
    assert "def route(" in BACKEND.lower(route_graph(8, k=2), "cuda:sm90").files["kernels.py"].decode()


def test_what_is_refused() -> None:
    pytest.importorskip("triton")
    assert _reason(ExpertsCase(stacked=False, widths=(8, 40, 3, 1, 17))) == "experts differ in their widths"
    assert "elements of type f64" in _reason(ExpertsCase(dtype="f64"))
    assert "TRITON_INTERPRET=1" in _reason(ExpertsCase(), "cpu")
    graph = ExpertsCase().graph()
    for value in graph.args:
        assert isinstance(value.type, TensorType)
        value.type = replace(value.type, device="xpu:0")
    assert "its operands are on xpu:0" in BACKEND.supports(program_op(graph), "cuda:sm90").reason


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.backends.triton.present", lambda: False)
    monkeypatch.setattr(module, "present", lambda: False)
    assert _reason(ExpertsCase()) == "Triton is not installed; pip install 'moec[triton]'"
    assert [line.works for line in BACKEND.status()] == [False, False, False]
    with pytest.raises(module.TritonError, match="not installed") as caught:
        BACKEND.load(BACKEND.lower(ExpertsCase().graph(), "cuda:sm90"))
    assert caught.value.hint == "pip install 'moec[triton]'"


def test_the_interpreter_has_to_be_asked_for_in_time() -> None:
    pytest.importorskip("triton.language")
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}), pytest.raises(module.TritonError, match="after"):
        module.load_module("import triton\n")


def test_kernels_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: object, data: object) -> None:
        raise OSError(28, "No space left on device")

    pytest.importorskip("triton")
    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(module.TritonError, match="No space left on device"):
        module.load_module("# a text that nobody has written yet\n")


def test_status_tells_of_the_interpreter() -> None:
    pytest.importorskip("triton")
    with interpreting():
        assert [line.works for line in BACKEND.status()] == [True, True, True]
        assert "interpreter" in BACKEND.status()[2].detail
