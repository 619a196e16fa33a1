"""Folders of checkpoints in fp8: loaded as they lie, compiled for GPUs with fp8 and without, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moec
from moec.aot.build import AotOptions, build
from moec.artifact.archive import Archive
from moec.backends.triton.compiled.cross import refusal
from moec.cli import main
from moec.cli.model import load_model
from moec.cli.source import source_of
from moec.ir.errors import MoecError
from moec.options import CompileOptions
from moec.report import Report
from tests.backends.cases import relative_error
from tests.support.fp8_folder import FP8, write_folder
from tests.support.interpreter import interpreting

TOKENS = torch.arange(11)[None] * 5 % 64
SUMS = 2e-5
"""f32 against f64, over two layers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8")


@pytest.fixture(scope="module")
def reference(folder: Path) -> nn.Module:
    return write_folder(folder)


@pytest.fixture(scope="module")
def want(reference: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = reference(input_ids=TOKENS, use_cache=False).logits
    return logits


def kinds(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if type(m).__name__.startswith("FP8")}


def test_it_is_loaded_as_it_lies_and_compiled(folder: Path, want: Tensor) -> None:
    model = load_model(str(folder)).model
    assert kinds(model) == {"FP8Linear", "FP8Experts"}
    reports: list[Report] = []
    compiled = moec.compile(model, inner="eager", report=reports.append)
    with torch.no_grad():
        got = compiled(TOKENS, use_cache=False).logits
    assert relative_error(got, want) <= SUMS
    assert [(b.fused, b.backend) for r in reports for b in r.layers] == [(True, "aten")]


def test_explain_shows_what_would_run(folder: Path, want: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(folder / "config.json")
    for given in ([str(folder)], [config, "--random-weights"]):
        with pytest.raises(SystemExit) as left:
            main(["explain", *given, "--target", "cuda:sm90", "--json"])
        assert not left.value.code
        told = json.loads(capsys.readouterr().out)
        assert [(layer["fused"], layer["backend"]) for layer in told["layers"]] == [(True, "triton")]
        assert "f8e4m3fn[8, 256, 160]" in told["layers"][0]["ir_after"]


@pytest.mark.skipif(bool(refusal()), reason=refusal() or "")
def test_it_is_compiled_for_a_gpu_as_it_lies(folder: Path, want: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    given, ranges = source_of(str(folder), dtype=None, dynamic="batch=1..1,seq=2..12", target="cuda:sm90")
    built = build(given, path, AotOptions(CompileOptions(target="cuda:sm90", checks="off"), ranges))
    assert [(b.fused, b.backend) for b in built.report.layers] == [(True, "triton")]
    with Archive(path) as archive:
        stored = {n: t.dtype for n, t in archive.manifest.weights.tensors.items()}
    on_disk = load_file(folder / "model.safetensors")
    assert sum(d == "f8e4m3fn" for d in stored.values()) == 2 + sum(
        t.dtype == torch.float8_e4m3fn for n, t in on_disk.items() if ".mlp.experts." not in n
    )
    with interpreting():
        got = moec.load(path)(TOKENS)
    assert isinstance(got, Tensor)
    assert relative_error(got, want) <= SUMS


@pytest.mark.parametrize("target", ["cpu", "cuda:sm80", "hip:gfx942"])
def test_elsewhere_it_is_what_the_numbers_stand_for(
    folder: Path, reference: nn.Module, want: Tensor, target: str
) -> None:
    given, _ = source_of(str(folder), dtype=None, dynamic=None, target=target)
    assert given.module is not None
    assert given.weights is not None
    assert not kinds(given.module)
    assert given.checkpoint is None
    brought = given.weights()
    assert set(brought) == {f"model.{name}" for name in reference.state_dict()}
    for name, exact in reference.state_dict().items():
        found = brought[f"model.{name}"]
        assert isinstance(found, Tensor)
        assert torch.equal(found, exact.float()), name


@pytest.mark.parametrize("scales", [torch.bfloat16])
def test_scales_of_another_type(folder: Path, scales: torch.dtype, tmp_path: Path) -> None:
    """As Qwen3's checkpoints have them."""
    write_folder(tmp_path, scales=scales)
    own = load_model(str(tmp_path)).model.state_dict()
    for name, wide in load_model(str(folder)).model.state_dict().items():
        if name.endswith("scale_inv"):
            assert own[name].dtype == torch.float32
            assert torch.equal(own[name], wide.to(scales).float()), name


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"activation_scheme": "static"}, "activation_scheme 'static', and kernels scale rows as they come"),
        ({"weight_block_size": None}, "a scale for a block of None, and kernels take blocks of 128 x 128"),
        ({"weight_block_size": [64, 64]}, r"a scale for a block of \[64, 64\]"),
        ({"expert_dtype": "fp4"}, "experts in fp4, and kernels multiply fp8"),
    ],
)
def test_other_forms_are_refused(
    folder: Path, want: Tensor, settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": FP8 | settings}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    for read in (load_model, lambda text: source_of(text, dtype=None, dynamic=None, target="cuda:sm90")):
        with pytest.raises(MoecError, match=told) as error:
            read(str(tmp_path))
        assert "dequantize" in str(error.value)


def test_what_transformers_cannot_load_says_how_it_is_quantized(folder: Path, want: Tensor, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": gptq}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(MoecError, match="the weights cannot be loaded") as error:
        load_model(str(tmp_path))
    assert "they are quantized (gptq): save them in bf16" in str(error.value)


def test_a_weight_that_is_missing_is_named(folder: Path, want: Tensor, tmp_path: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(MoecError, match=r"layers.0.self_attn.o_proj.weight_scale_inv' cannot be read"):
        load_model(str(tmp_path))
