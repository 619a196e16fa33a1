"""Artifacts of models whose experts ``moec.prepare`` rewrites: weights in fp8, and two families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import moec
from moec.aot.build import AotOptions, Built, build
from moec.aot.source import Source, Tokens, for_experts
from moec.artifact.archive import Archive
from moec.artifact.gpu import read_kernels
from moec.backends.triton.compiled.cross import refusal
from moec.ir.errors import MoecError
from moec.options import CompileOptions
from tests.backends.cases import relative_error
from tests.support.fp8_models import deepseek
from tests.support.interpreter import interpreting

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal() or "")

TOKENS = torch.arange(11)[None] * 5 % 64
ROUNDING = 8e-3
"""One unit in the last place of bf16."""
SUMS = 5e-6
"""fp32: sums in another order."""


def compiled(model: torch.nn.Module, target: str, path: Path) -> tuple[torch.nn.Module, Built]:
    wrapped = Tokens(for_experts(model)).eval()
    options = AotOptions(CompileOptions(target=target, checks="off"), {"batch": (1, 1), "seq": (2, 12)})
    return wrapped, build(Source("model", wrapped, (TOKENS,)), path, options)


def logits(path: Path) -> torch.Tensor:
    with interpreting():
        got = moec.load(path)(TOKENS)
    assert isinstance(got, torch.Tensor)
    return got


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_weights_in_fp8_stay_what_they_are(scale_fmt: str, tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    model, built = compiled(deepseek(scale_fmt), "cuda:sm90", path)
    assert [(b.fused, b.backend) for b in built.report.layers] == [(True, "triton")]
    with Archive(path) as archive:
        tensors = archive.manifest.weights.tensors
        stored = {name.rpartition(".experts.")[2]: t.dtype for name, t in tensors.items() if ".experts." in name}
        kernels = [k for p in read_kernels(archive, archive.manifest.blobs[0])["programs"] for k in p["kernels"]]
        assembly = {k["assembly"]: archive.read(k["assembly"]).decode() for k in kernels}
    scale = "f32" if scale_fmt == "float" else "f8e8m0fnu"
    assert stored == {
        **dict.fromkeys(("gate_up_proj", "down_proj"), "f8e4m3fn"),
        **dict.fromkeys(("gate_up_proj_scale_inv", "down_proj_scale_inv"), scale),
    }
    assert {"quantize_x", "quantize_a", "up", "down"} <= {k["name"] for k in kernels}
    narrow = {name for name, text in assembly.items() if "e4m3" in text}
    assert {Path(name).name.partition(".")[0] for name in narrow} == {"quantize_x", "up", "quantize_a", "down"}
    with torch.no_grad():
        want = model(TOKENS)
        assert relative_error(logits(path), want) <= ROUNDING
        (found,) = (m for m in model.modules() if type(m).__name__ == "FP8Experts")
        found.down_proj_scale_inv.copy_(found.down_proj_scale_inv.float() * 2)
        assert relative_error(model(TOKENS), want) > ROUNDING, "experts say something beside the rest"


def test_weights_in_fp8_on_a_gpu_without_it(tmp_path: Path) -> None:
    path = tmp_path / "model.moec"
    model, built = compiled(deepseek(), "cuda:sm80", path)
    assert any("sm80 has no matrix instructions for fp8" in str(remark) for remark in built.report.remarks)
    with torch.no_grad():
        assert relative_error(logits(path), model(TOKENS)) <= ROUNDING


def test_weights_in_fp8_on_a_cpu_are_refused(tmp_path: Path) -> None:
    told = r"layers.1.mlp.experts have weights in fp8, and no kernel for this target multiplies them"
    with pytest.raises(MoecError, match=told) as error:
        compiled(deepseek(), "cpu", tmp_path / "model.moec")
    assert "--target cuda:sm90" in str(error.value)
    assert not list(tmp_path.iterdir())


def dbrx() -> torch.nn.Module:
    inner = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64, "vocab_size": 64, "ffn_config": inner}
    attention = {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4}
    return transformers.DbrxForCausalLM(transformers.DbrxConfig(**sizes, attn_config=attention))


def llama4() -> torch.nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    inner = {"intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1}
    more = {"num_key_value_heads": 1, "interleave_moe_layer_step": 1, "pad_token_id": 0}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, **inner, **more))


@pytest.mark.parametrize("family", [dbrx, llama4])
def test_families_with_a_forward_of_their_own(family: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = family().eval()
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.normal_(0, 0.2)
        want = given(input_ids=TOKENS, use_cache=False).logits  # by its own forward
    path = tmp_path / "model.moec"
    _, built = compiled(given, "cuda:sm80", path)
    assert [(b.fused, b.backend) for b in built.report.layers] == [(True, "triton")]
    torch.testing.assert_close(logits(path), want, atol=SUMS, rtol=SUMS)
