"""What the command line says about GPUs on a machine without one."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import moec.selfcheck
from moec import doctor
from moec.backends.base import program_op
from moec.backends.triton.compiled.cross import refusal
from moec.backends.triton.compiled.plan import calls
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.spec import read_spec
from moec.cli import main
from moec.cli.selfcheck import _table
from moec.gpu_plans import gpu_plans
from moec.ir.errors import MoecError
from moec.ir.parser import parse_graph
from moec.report import BlockReport, Report
from moec.selfcheck import SelfCheckError, selfcheck
from moec.selfcheck_layers import LAYERS, ROUTERS
from moec.targets import TargetError
from tests.support.interpreter import interpreting

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal() or "")

BLOCK = """
graph @block(%x: bf16[T, 2048], %ids: i64[T, 8], %w: f32[T, 8], %up: bf16[64, 2048, 2048],
             %down: bf16[64, 2048, 1024]) -> bf16[T, 2048] {
  %y = moe.experts %x, %ids, %w, [%up], [%down] {experts = 64} {
    (%g: bf16[R, 1024], %u: bf16[R, 1024]) -> bf16[R, 1024] {
      %s = torch.call @aten.silu.default(%g) : bf16[R, 1024]
      %m = torch.call @aten.mul.Tensor(%s, %u) : bf16[R, 1024]
      return %m
    }
  } : bf16[T, 2048]
  return %y
}
"""


def block(name: str, **changes: Any) -> BlockReport:
    return BlockReport(name, fused=True, ir_after=changes.get("ir_after", BLOCK), reason=changes.get("reason"))


def test_equal_layers_have_one_plan() -> None:
    (plan,) = gpu_plans(Report([block("a"), block("b")]), "cuda:sm90")
    assert plan.blocks == ("a", "b")
    tokens = [launch["tokens"] for launch in plan.launches]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 16384
    first, last = plan.launches[0], plan.launches[-1]
    assert (first["form"], first["bound"]) == ("gemv", "memory")
    assert (last["form"], last["bound"]) == ("gemm", "compute")
    assert last["up"]["block_m"] * last["up"]["units"] >= 128
    assert 0 < last["up"]["shared"] <= 227 * 1024


def test_a_block_without_kernels_says_why() -> None:
    left = BlockReport("a", fused=False, reason="it is dense")
    uneven = block("b", ir_after=BLOCK.replace("bf16", "f64"))
    reasons = {p.blocks[0]: p.reason for p in gpu_plans(Report([left, uneven]), "hip:gfx942")}
    assert reasons["a"] == "it is dense"
    assert "f64" in reasons["b"]


def test_a_cpu_has_no_plans() -> None:
    with pytest.raises(TargetError, match="is no GPU"):
        gpu_plans(Report([block("a")]), "cpu:avx2")


def test_the_doctor_says_what_can_be_compiled() -> None:
    found = {c.name: c for c in doctor._gpu()}
    assert found["compile for a GPU"].state == "ok"
    assert "hip:gfx942" in found["compile for a GPU"].detail
    assert found["GPU"].state == "missing"
    assert "selfcheck" in found["GPU"].hint


def test_selfcheck_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["selfcheck", "--target", "cuda"])
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert "PyTorch sees no GPU on this machine" in told
    assert "TRITON_INTERPRET=1" in told


def test_selfcheck_of_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["selfcheck", "--target", "cpu"])
    assert "no self-check for target 'cpu'" in capsys.readouterr().err


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "clamped, interleaved, biases, transposed"
    monkeypatch.setattr(moec.selfcheck, "LAYERS", {name: LAYERS[name]})
    monkeypatch.setattr(moec.selfcheck, "DTYPES", {"bf16": torch.bfloat16})
    monkeypatch.setattr(moec.selfcheck, "ROUTERS", {"top k first": ROUTERS["top k first"]})


@pytest.mark.usefixtures("few")
def test_selfcheck_in_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    with interpreting(), pytest.raises(SystemExit) as left:
        main(["selfcheck", "--json"])
    assert left.value.code in (0, None)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {r["what"] for r in rows} == {"router", "backward", *moec.selfcheck.forms(torch.device("cpu"))}
    assert all(r["ok"] for r in rows)


FP8 = "silu(g)*u, weights in fp8"


def test_selfcheck_of_weights_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in every form, and wrong where the reference is given other scales."""
    monkeypatch.setattr(moec.selfcheck, "LAYERS", {FP8: LAYERS[FP8]})
    monkeypatch.setattr(moec.selfcheck, "DTYPES", {"bf16": torch.bfloat16})
    cpu = torch.device("cpu")
    with interpreting():
        assert [r for r in moec.selfcheck._layers(cpu) if not r.ok] == []
        assert not list(moec.selfcheck._gradients(cpu))
        right = moec.selfcheck.run_graph
        monkeypatch.setattr(moec.selfcheck, "forms", lambda device, fp8: {"chosen": None})
        monkeypatch.setattr(
            moec.selfcheck, "run_graph", lambda graph, given: right(graph, [*given[:-1], given[-1] * 1.1])
        )
        (row,) = moec.selfcheck._layers(cpu)
    assert not row.ok


def test_selfcheck_of_a_gpu_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moec.selfcheck, "LAYERS", {FP8: LAYERS[FP8]})
    monkeypatch.setattr(moec.selfcheck, "DTYPES", {"bf16": torch.bfloat16})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("moec.backends.triton.fp8.target_of", lambda device: "cuda:sm80")
    (row,) = moec.selfcheck._layers(torch.device("cuda"))
    assert row.ok
    assert "sm80 has no matrix instructions for fp8" in row.left
    shown = Console(width=300, record=True, file=io.StringIO())
    shown.print(_table([row], "a GPU"))
    assert "sm80 has no matrix instructions for fp8" in shown.export_text()


def test_no_kernel_is_left_out() -> None:
    """Of those of a layer: by what is launched on a GPU for the numbers of tokens that are checked there."""
    there, launched = set(), set()
    for layer in LAYERS.values():
        spec = read_spec(program_op(parse_graph(layer.text("bf16", 256, 384))))
        file = write_experts(spec)
        there |= set(file.kernels)
        for form in moec.selfcheck.forms(torch.device("cuda"), layer.fp8).values():
            for tokens in (1, 130):
                launched |= {c.kernel for c in calls(spec, form, tokens, file)} if form else set()
    assert there == launched


@pytest.mark.usefixtures("few")
def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = moec.selfcheck.TritonExperts.backward

    def wrong(self: Any, grads: Any, inputs: Any, needs: Any) -> Any:
        found = right(self, grads, inputs, needs)
        found[-1] = found[-1] * 1.1  # of a bias: small beside the others
        return found

    monkeypatch.setattr(moec.selfcheck.TritonExperts, "backward", wrong)
    monkeypatch.setattr(moec.selfcheck, "forms", lambda device, fp8=False: {})
    with interpreting():
        assert [r.ok for r in moec.selfcheck._gradients(torch.device("cpu"))] == [False]


@pytest.mark.usefixtures("few")
def test_wrong_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = moec.selfcheck.Forced.forward

    def wrong(self: moec.selfcheck.Forced, inputs: list[Tensor]) -> list[Tensor]:
        (out,) = right(self, inputs)
        if self.forced is not None and self.forced.atomic:
            raise MoecError("the device is gone")
        return [out + out.abs().max() * 0.05] if self.forced is not None and self.forced.form == "gemv" else [out]

    monkeypatch.setattr(moec.selfcheck.Forced, "forward", wrong)
    all_forms = moec.selfcheck.forms(torch.device("cpu"))
    some = {form: all_forms[form] for form in ("tiles", "vectors", "tiles, atomic sums")}
    monkeypatch.setattr(moec.selfcheck, "forms", lambda device, fp8=False: some)
    with interpreting():
        bad = [r for r in selfcheck() if not r.ok]
    assert {r.what for r in bad} == {"vectors", "tiles, atomic sums"}
    assert any("the device is gone" in r.failure for r in bad)


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moec.selfcheck, "present", lambda: False)
    with pytest.raises(SelfCheckError, match="Triton is not installed"):
        selfcheck()
