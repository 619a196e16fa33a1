"""Artifacts for GPUs, made and looked into where there is none, and run in Triton's interpreter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import moec
from moec.aot.build import AotOptions, build
from moec.aot.source import Source, Tokens, for_experts
from moec.artifact.archive import Archive
from moec.artifact.errors import ArtifactError
from moec.artifact.gpu import read_kernels
from moec.backends.base import program_op
from moec.backends.triton.compiled.built import Expected, expected
from moec.backends.triton.compiled.cross import refusal
from moec.backends.triton.compiled.driver import DriverError, Function
from moec.backends.triton.compiled.plan import MOST_TOKENS, Call, calls
from moec.backends.triton.compiled.prebuilt import PrebuiltExperts, read_kernel, read_launch
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launches.launch import Planned
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.spec import read_spec
from moec.cli import main
from moec.cli.source import source_of
from moec.ir.errors import MoecError
from moec.ir.parser import parse_graph
from moec.options import CompileOptions
from tests.support import models
from tests.support.interpreter import interpreting

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal() or "")

TOLERANCE = 5e-6
"""fp32: re-association inside GEMMs, over two layers."""
RANGES = {"batch": (1, 2), "seq": (2, 24)}


def source(name: str = "mixtral") -> Source:
    model = Tokens(for_experts(models.build(name, layers=2))).eval()
    return Source(name, model, (models.inputs(name, 2, 12)["input_ids"],))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    path = tmp_path_factory.mktemp("gpu") / "mixtral.moec"
    given = source()
    build(given, path, AotOptions(CompileOptions(target="cuda:sm80", checks="off"), RANGES))
    return given, path


def told(path: Path) -> dict[str, Any]:
    with Archive(path) as archive:
        return read_kernels(archive, archive.manifest.blobs[0])


def test_it_holds_code_and_says_what_it_takes(made: tuple[Source, Path]) -> None:
    with Archive(made[1]) as archive:
        manifest = archive.manifest
        listed = read_kernels(archive, manifest.blobs[0])
        kernels = [k for p in listed["programs"] for k in p["kernels"]]
        for kernel in kernels:
            assert archive.read(kernel["code"]).startswith(b"\x7fELF")
            assert b".target sm_80" in archive.read(kernel["assembly"])
        source_text = archive.read(listed["programs"][-1]["source"]).decode()
    assert (manifest.target, manifest.blobs[0].kind) == ("cuda:sm80", "triton")
    assert not any(name.startswith("cpu/") for name in manifest.members)
    assert {"route", "up_vector", "down_vector"} <= {k["name"] for k in kernels}
    assert all(k["spills"] == 0 and 0 < k["registers"] <= 255 and k["occupancy"] >= 1 for k in kernels)
    assert "@triton.jit" in source_text
    assert len(listed["programs"]) == 2  # both layers have one router and one layer of experts
    assert len(listed["calls"]["model"]) == 4


def test_it_covers_every_number_of_tokens(made: tuple[Source, Path]) -> None:
    experts = next(p for p in told(made[1])["programs"] if p["launches"])
    assert experts["launches"][-1]["tokens"] >= 2 * 24
    for launch in experts["launches"]:
        assert sum(s["seconds"] for s in launch["steps"]) >= sum(s["limit_seconds"] for s in launch["steps"]) > 0


def test_kernels_share_the_time_of_their_steps(made: tuple[Source, Path]) -> None:
    program = next(p for p in told(made[1])["programs"] if p["launches"])
    largest = program["launches"][-1]
    last = [k["expected"] for k in program["kernels"] if k["expected"]["tokens"] == largest["tokens"]]
    for key in ("seconds", "limit_seconds"):
        assert sum(e[key] for e in last) == pytest.approx(sum(s[key] for s in largest["steps"]))
    (route,) = next(p for p in told(made[1])["programs"] if not p["launches"])["kernels"]
    assert route["expected"]["seconds"] > route["expected"]["limit_seconds"] > 0


def test_kernels_of_a_step_divide_it() -> None:
    tile = Tile(64, 32, 32)
    planned = Planned(Launch("gemm", tile, tile), 128, "memory", (("sort", 6e-6, 0.0), ("up", 3e-6, 2e-6)))
    together = [Call(name, (), 4, 3, frozenset()) for name in ("count", "offsets", "place", "up", "post")]
    found = {call.kernel: expected(call, together, planned) for call in together}
    assert found == {
        **dict.fromkeys(("count", "offsets", "place"), Expected(128, 2e-6, 0.0)),
        "up": Expected(128, 3e-6, 2e-6),
        "post": None,
    }


def test_inspect_shows_what_kernels_take(made: tuple[Source, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(made[1])])
    assert left.value.code in (0, None)
    shown = capsys.readouterr().out
    for word in ("kernels for cuda:sm80", "spills", "resident", "roofline", "up_vector.0", "bound by"):
        assert word in shown


def test_without_a_gpu_it_says_so(made: tuple[Source, Path]) -> None:
    with pytest.raises(ArtifactError, match="holds kernels for cuda:sm80, and this machine has no GPU"):
        moec.load(made[1])


def test_another_gpu_is_named(made: tuple[Source, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("moec.artifact.gpu.target_of", lambda device: "cuda:sm90")
    with pytest.raises(ArtifactError, match="for cuda:sm80, and this GPU is cuda:sm90"):
        moec.load(made[1])


def test_in_the_interpreter_it_is_the_model(made: tuple[Source, Path]) -> None:
    given, path = made
    model = given.module
    assert model is not None
    with interpreting():
        loaded = moec.load(path)
        for shape in ((1, 5), (2, 24)):
            tokens = torch.randint(0, 60, shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                want = model(tokens)
            got = loaded(tokens)
            assert isinstance(got, torch.Tensor)
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


class Recorded:
    """A driver that notes what it is asked for."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launches: list[dict[str, Any]] = []

    def load(self, code: bytes, name: str, threads: int, shared: int) -> Function:
        self.loaded.append(name)
        return Function(len(self.loaded), threads, shared)

    def launch(self, function: Function, grid: Any, types: Any, values: Any, stream: int = 0, scratch: int = 0) -> None:
        name = self.loaded[function.handle - 1]
        self.launches.append({"name": name, "grid": tuple(grid), "all": [*zip(types, values, strict=True)]})


def prebuilt(path: Path) -> tuple[PrebuiltExperts, Recorded]:
    with Archive(path) as archive:
        program = next(p for p in read_kernels(archive, archive.manifest.blobs[0])["programs"] if p["launches"])
        op = program_op(parse_graph(archive.read(program["program"]).decode()))
    driver = Recorded()
    kernels = [read_kernel(k, lambda: b"code") for k in program["kernels"]]
    launches = [read_launch(p) for p in program["launches"]]
    lying = read_spec(op).lying(program["up_nk"], program["down_nk"])
    return PrebuiltExperts(op, lying, launches, kernels, driver), driver


def inputs(kernel: PrebuiltExperts, tokens: int) -> list[torch.Tensor]:
    s = kernel.spec
    ids = torch.zeros(tokens, s.top_k, dtype=torch.int64)
    up, down = torch.empty(s.experts, 2 * s.inner, s.hidden), torch.empty(s.experts, s.out, s.inner)
    return [torch.empty(tokens, s.hidden), ids, torch.empty(tokens, s.top_k), up, down]


def test_binaries_are_launched_with_the_tensors(made: tuple[Source, Path]) -> None:
    kernel, driver = prebuilt(made[1])
    given = inputs(kernel, 5)
    (out,) = kernel.forward(given)
    assert out.shape == (5, kernel.spec.width)
    assert [c["name"] for c in driver.launches] == ["up_vector", "down_vector"]
    assert driver.launches[0]["grid"][0] == 5 * kernel.spec.top_k
    kernel.forward(given)
    assert len(driver.loaded) == 2  # once


def test_views_of_wider_tensors_are_copied(made: tuple[Source, Path]) -> None:
    kernel, driver = prebuilt(made[1])
    given = inputs(kernel, 5)
    hidden = kernel.spec.hidden
    for x in (torch.empty(5 * hidden + 1)[1:].view(5, -1), torch.empty(5, hidden + 1)[:, :-1]):
        kernel.forward([x, *given[1:]])
        told = driver.launches[-2]
        assert told["name"] == "up_vector"
        assert not any(v % 16 for t, v in told["all"] if t.startswith("*"))
        assert (("i64", hidden)) in told["all"]


def test_calls_of_any_size_are_launched_as_the_largest(made: tuple[Source, Path]) -> None:
    kernel, _ = prebuilt(made[1])
    largest = replace(kernel._launches[-1][1], form="gemm")
    kernel._launches[-1] = MOST_TOKENS, largest
    assert kernel.launch(kernel._lying, 5 * MOST_TOKENS, torch.device("cpu")) == largest
    file = write_experts(kernel._lying)
    tile = Tile(64, 32, 32)
    at = Launch("gemm", tile, tile, programs=66)
    assert calls(kernel._lying, at, 16 * MOST_TOKENS, file) == calls(kernel._lying, at, MOST_TOKENS, file)


def test_what_the_artifact_was_not_compiled_for_is_told(made: tuple[Source, Path]) -> None:
    kernel, _ = prebuilt(made[1])
    with pytest.raises(DriverError, match="a call has 5000 tokens"):
        kernel.forward(inputs(kernel, 5000))
    given = inputs(kernel, 5)
    given[4] = torch.empty(given[4].numel() + 1)[1:].view(given[4].shape)  # four bytes from a multiple of 16
    with pytest.raises(DriverError, match="for tensors that lie so"):
        kernel.forward(given)
    given = inputs(kernel, 5)
    given[3] = given[3].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(DriverError, match="lie in memory otherwise"):
        kernel.forward(given)


def test_a_list_of_kernels_that_is_no_list(made: tuple[Source, Path]) -> None:
    blob = SimpleNamespace(member="cuda-sm80/kernels.json")
    good = told(made[1])
    for bad in (
        b"{",
        b"[]",
        b'{"programs": [{}]}',
        json.dumps({"programs": [{**good["programs"][0], "program": "x"}]}).encode(),
    ):
        members = dict.fromkeys(k["code"] for p in good["programs"] for k in p["kernels"])
        archive = SimpleNamespace(read=lambda _, bad=bad: bad, path="a.moec", manifest=SimpleNamespace(members=members))
        with pytest.raises(ArtifactError, match=r"list of kernels"):
            read_kernels(archive, blob)  # type: ignore[arg-type]


def test_tuning_needs_the_gpu(tmp_path: Path) -> None:
    for target, told in (("cuda:sm90", "measures on a GPU of the target cuda:sm90"), ("cpu", "is for GPU targets")):
        options = AotOptions(CompileOptions(target=target, checks="off"), RANGES, tune=True)
        with pytest.raises(MoecError, match=told):
            build(source(), tmp_path / "out.moec", options)


def test_weights_beside_are_for_cpus(tmp_path: Path) -> None:
    options = AotOptions(CompileOptions(target="hip:gfx942", checks="off"), RANGES, weights="beside")
    with pytest.raises(MoecError, match="--weights beside is for CPU targets"):
        build(source(), tmp_path / "out.moec", options)
    assert not list(tmp_path.iterdir())


def test_weights_left_out(made: tuple[Source, Path], tmp_path: Path) -> None:
    """A configuration alone is enough then, and what its weights would take is neither in memory nor on the disk."""
    config = made[0].module.model.config  # type: ignore[union-attr]
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    given, ranges = source_of(str(tmp_path / "config.json"), dtype=None, dynamic="batch=1..2,seq=2..24", weights="none")
    path = tmp_path / "code.moec"
    build(given, path, AotOptions(CompileOptions(target="cuda:sm80", checks="off"), ranges, weights="none"))
    with Archive(path) as archive, Archive(made[1]) as whole:
        assert archive.manifest.weights.where == "none"
        assert archive.manifest.weights.tensors == whole.manifest.weights.tensors
        assert "weights.bin" not in archive.manifest.members
        assert [licence.part for licence in archive.manifest.licences] == ["moec's kernels"]
        programs = {n for n in archive.manifest.members if n.endswith(".cubin")}
        assert programs == {n for n in whole.manifest.members if n.endswith(".cubin")}
    with interpreting(), pytest.raises(ArtifactError, match="was compiled without weights"):
        moec.load(path)


def test_weights_left_out_are_for_gpus(tmp_path: Path) -> None:
    options = AotOptions(CompileOptions(checks="off"), RANGES, weights="none")
    with pytest.raises(MoecError, match="--weights none is for GPU targets"):
        build(source(), tmp_path / "out.moec", options)


def test_a_router_without_a_kernel_leaves_the_experts_theirs(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "use_cache": False}
    config = transformers.PhimoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    torch.manual_seed(0)
    model = Tokens(for_experts(transformers.PhimoeForCausalLM(config))).eval()
    tokens = torch.arange(10)[None] * 5 % 64
    options = AotOptions(CompileOptions(target="cuda:sm80", checks="off"), {"batch": (1, 1), "seq": (2, 12)})
    built = build(Source("phimoe", model, (tokens,)), tmp_path / "phimoe.moec", options)
    (block,) = built.report.layers
    assert (block.fused, block.backend) == (True, "triton")
    assert any("PyTorch's operations run moe.route on the device" in str(r) for r in built.report.remarks)
    calls = told(tmp_path / "phimoe.moec")["calls"]["model"]
    assert [bool(name) for name in calls] == [False, True]
    with interpreting(), torch.no_grad():
        torch.testing.assert_close(
            moec.load(tmp_path / "phimoe.moec")(tokens), model(tokens), atol=TOLERANCE, rtol=TOLERANCE
        )


def test_tokens_are_not_regrouped_on_a_device(tmp_path: Path) -> None:
    passes = "default,reschedule-tokens{always=true,cut=true}"
    options = AotOptions(CompileOptions(target="cuda:sm80", checks="off", passes=passes), RANGES)
    report = build(source(), tmp_path / "parts.moec", options).report
    assert len(report.layers) == 2 and all(layer.fused for layer in report.layers)
    said = [remark for remark in report.remarks if "reschedule-tokens" in remark]
    assert len(said) == 2 and all("it stays as it is: no backend takes what it would become" in text for text in said)
