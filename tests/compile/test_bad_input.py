"""What goes wrong is told once and whole: what is the matter, in which block, at which line, and what to do."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import moec
from moec import MoecError, MoecWarning, cache
from moec.cache import CacheWarning
from moec.runtime import counters
from tests.compile.blocks import EXPERTS, Block, Layers, tokens
from tests.compile.watch import Watch, moec_compile
from tests.support.models import build, inputs

SAME = 1e-5  # relative; two fp32 layers whose sums may be taken in another order


def listen(run: Callable[[], Any], category: type[Warning] = MoecWarning) -> tuple[Any, list[str]]:
    """What ``run`` gives, and the warnings of that category."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if issubclass(w.category, category)]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=SAME, atol=SAME, equal_nan=True)


# --- models and blocks that moec leaves alone ---------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_model_without_moe_compiles_and_says_so_once(inner: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    compiled = moec_compile(model, inner=inner)
    with moec.recording() as report:
        outs, told = listen(lambda: [compiled(tokens(n)) for n in (5, 7, 1)])
    for out, n in zip(outs, (5, 7, 1), strict=True):
        same(out, model(tokens(n)))
    assert report.graphs > 1
    assert not report.layers
    assert told == ["no MoE block was found in the graph; PyTorch compiles all of it"]
    assert report.remarks == told
    assert "no MoE block was found" in str(report)


@pytest.mark.parametrize("checks", ["strict", "off"])
def test_model_without_moe_is_no_error(checks: str) -> None:
    model = nn.Linear(16, 4)
    out, told = listen(lambda: moec_compile(model, checks=checks)(tokens()))
    same(out, model(tokens()))
    assert len(told) == (checks == "strict")


def test_unrecognised_block_runs_as_pytorch_and_is_named() -> None:
    model = Layers(Block(), Block(best_only=True))
    seen = Watch(model)
    with moec.recording() as report, torch.no_grad():
        out, told = listen(lambda: moec_compile(model, watch=seen)(tokens()))
    same(out, model(tokens()))
    assert [b.fused for b in report.layers] == [True, False]
    assert seen.ops["moec::experts"] == 1
    assert seen.expert_reads["aten::index"] == 2
    left = report.layers[1]
    assert left.name == "layers.1"
    assert "not added per token" in left.reason
    assert re.search(r"blocks\.py:\d+: .*torch\.bmm\(self\.down", left.source)
    (message,) = told
    assert all(part in message for part in ("'layers.1'", left.reason, left.source))


def test_unrecognised_block_is_one_error_when_strict() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        moec_compile(Layers(Block(best_only=True)), checks="strict")(tokens())
    text = str(caught.value)
    assert isinstance(caught.value.inner_exception, MoecError)
    assert str(caught.value.inner_exception) in text, "Dynamo's wrapper must not cut our message"
    for part in ("'layers.0' is not fused", "not added per token", "blocks.py:", "moec.explain shows all blocks"):
        assert part in text


def test_unrecognised_block_is_silent_when_off() -> None:
    model = Layers(Block(best_only=True))
    out, told = listen(lambda: moec_compile(model, checks="off")(tokens()))
    assert not told
    same(out, model(tokens()))


def test_a_fused_model_says_nothing() -> None:
    _, told = listen(lambda: moec_compile(Layers(Block()), checks="strict")(tokens()), category=UserWarning)
    assert not [t for t in told if "MoE" in t or "moec" in t]


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [EXPERTS, 99, -1])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("checks", ["warn", "off"])
def test_ids_out_of_range(bad: int, inner: str, checks: str) -> None:
    model = Block()
    compiled = moec_compile(model, inner=inner, checks=checks)
    good = torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0], [2, 0]])
    with torch.no_grad():
        same(compiled(tokens(), good), model(tokens(), good))
        wrong = good.clone()
        wrong[3, 1] = bad
        with pytest.raises(
            MoecError, match=rf"expert id {bad} is out of range: the layer has {EXPERTS} experts"
        ) as caught:
            compiled(tokens(), wrong)
        assert "blocks.py:" in str(caught.value)
        same(compiled(tokens(), good), model(tokens(), good))


def broken_router() -> Layers:
    model = Layers(Block(), Block(seed=1))
    with torch.no_grad():
        model.layers[1].router[2, 3] = float("nan")
    return model


@torch.no_grad()
def test_nan_router_logits_warn_once_and_go_on_as_eager() -> None:
    model = broken_router()
    compiled = moec_compile(model)
    outs, told = listen(lambda: [compiled(tokens()), compiled(tokens())])
    for out in outs:
        same(out, model(tokens()))
    (message,) = told
    assert message.startswith(
        "MoE block 'layers.1': NaN in the router logits of 5 of 5 tokens; results are as in eager"
    )


@torch.no_grad()
def test_nan_router_logits_strict_and_off() -> None:
    model = broken_router()
    with pytest.raises(MoecError, match=r"'layers\.1': NaN in the router logits of 5 of 5 tokens"):
        moec_compile(model, checks="strict")(tokens())
    out, told = listen(lambda: moec_compile(model, checks="off")(tokens()))
    assert not told
    same(out, model(tokens()))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("lengths", [(0,), (5, 7, 0, 3)], ids=["first", "later"])
def test_empty_batch(inner: str, lengths: tuple[int, ...]) -> None:
    model = Layers(Block())
    compiled = moec_compile(model, inner=inner)
    for length in lengths:
        x = tokens(length).requires_grad_()
        out = compiled(x)
        assert out.shape == (length, 16)
        same(out, model(x))
        out.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
    assert counters.snapshot().by_name["moec::experts"] == len(lengths)


def test_empty_batch_of_a_model_that_has_no_answer_either() -> None:
    """transformers' attention cannot do it: one error, which is PyTorch's."""
    model = build("mixtral", layers=1)
    empty = torch.zeros((0, 5), dtype=torch.long)
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        model(input_ids=empty)
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        moec_compile(model)(input_ids=empty)


# --- devices and types -----------------------------------------------------------------------------------------------


def with_down(**to: Any) -> Block:
    block = Block()
    block.down = nn.Parameter(block.down.detach().to(**to))
    return block


@pytest.mark.parametrize("where", ["tokens", "weights"])
def test_mixed_devices_name_both(where: str) -> None:
    model, x = (Block(), tokens().to("meta")) if where == "tokens" else (with_down(device="meta"), tokens())
    with pytest.raises(RuntimeError, match=r"(?s)meta and cpu|cpu and meta") as caught:
        moec_compile(model)(x)
    assert "blocks.py" in str(caught.value)


def test_all_on_meta_is_no_mixture() -> None:
    out = moec_compile(Layers(Block()).to("meta"))(tokens().to("meta"))
    assert out.shape == (5, 16)
    assert out.device.type == "meta"


@pytest.mark.parametrize("where", ["tokens", "weights"])
def test_mixed_types_name_both(where: str) -> None:
    model, x = (Block(), tokens().double()) if where == "tokens" else (with_down(dtype=torch.bfloat16), tokens())
    other = "double|float64" if where == "tokens" else "(?i:bfloat16)"
    with pytest.raises(RuntimeError, match=rf"(?s)({other}).*(?i:float)") as caught:
        moec_compile(model)(x)
    assert "blocks.py" in str(caught.value)


@torch.no_grad()
def test_mixed_types_that_eager_can_do() -> None:
    """transformers' grouped form casts rows to the weight's type: PyTorch's own path, and a remark that says so."""
    model = build("mixtral", layers=1)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().bfloat16())
    batch = inputs("mixtral", 1, 5)
    with moec.recording() as report:
        out, told = listen(lambda: moec_compile(model)(**batch).logits)
    same(out, model(**batch).logits)
    assert not report.layers[0].fused
    assert "mixed types" in report.layers[0].reason
    assert len(told) == 1
    assert "bf16, f32" in told[0]


# --- options ---------------------------------------------------------------------------------------------------------

MISSPELT: list[tuple[dict[str, Any], str]] = [
    ({"chekcs": "warn"}, "unknown option 'chekcs'; did you mean 'checks'?"),
    ({"checks": "wran"}, "option 'checks' cannot be 'wran'; did you mean 'warn'?"),
    ({"inner": "inducter"}, "option 'inner' cannot be 'inducter'; did you mean 'inductor'?"),
    ({"passes": "fuse-expert"}, "unknown pass 'fuse-expert'; did you mean 'fuse-experts'"),
    ({"backends": ["atne"]}, "unknown backend 'atne'; did you mean 'aten'?"),
    ({"target": "cpuu"}, "unknown target 'cpuu'; did you mean 'cpu'"),
    ({"fuel": -1}, "option 'fuel' cannot be -1"),
]


@pytest.mark.parametrize(("wrong", "message"), MISSPELT, ids=[next(iter(w)) for w, _ in MISSPELT])
def test_misspelt_options(wrong: dict[str, Any], message: str) -> None:
    options = {"inner": "eager", **wrong}
    with pytest.raises(BackendCompilerFailed) as wrapped:
        torch.compile(Block(), backend="moec", options=options)(tokens())
    assert isinstance(wrapped.value.inner_exception, MoecError)
    assert str(wrapped.value.inner_exception) in str(wrapped.value)
    assert message in str(wrapped.value)
    with pytest.raises(MoecError, match=re.escape(message)):
        moec.compile(Block(), prepare=False, **options)


# --- the cache directory ---------------------------------------------------------------------------------------------


def compile_with_cache(monkeypatch: pytest.MonkeyPatch, folder: Path, home: Path) -> list[str]:
    """The cache warnings of two compiles whose results are right."""
    monkeypatch.setenv("MOEC_CACHE_DIR", str(folder))
    monkeypatch.setattr(cache, "_resolved", {})
    monkeypatch.setattr(cache, "_told", set())
    monkeypatch.setattr("tempfile.tempdir", str(home))
    model = Layers(Block(), Block(seed=1))

    def twice() -> None:
        for _ in range(2):
            torch._dynamo.reset()
            with torch.no_grad(), moec.recording() as report:
                same(moec_compile(model)(tokens()), model(tokens()))
            assert report.all_fused

    return listen(twice, CacheWarning)[1]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "temporary"
    path.mkdir(mode=0o700)
    return path


def test_good_cache_directory_gets_the_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    assert not compile_with_cache(monkeypatch, tmp_path / "good", home)
    assert len(list((tmp_path / "good" / "programs").glob("m*.moe"))) == 2 * 2  # route and experts of two blocks
    assert not list(home.iterdir())


def test_cache_directory_that_others_may_write_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (told,) = compile_with_cache(monkeypatch, shared, home)
    assert "is refused, because code is loaded from it" in told
    assert "may be written to by other users (mode 0777)" in told
    assert not list(shared.iterdir())
    (private,) = home.iterdir()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert list((private / "programs").glob("m*.moe"))


def test_broken_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (told,) = compile_with_cache(monkeypatch, tmp_path / "file" / "cache", home)
    assert "cannot be used" in told
    assert "is not a directory" in told


def test_read_only_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    frozen = tmp_path / "frozen"
    frozen.mkdir(mode=0o500)
    real = os.access  # the superuser may write anywhere: the answer is played
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != frozen and real(path, mode))
    (told,) = compile_with_cache(monkeypatch, frozen, home)
    assert "cannot be read and written by this user" in told
    assert not list(frozen.iterdir())


def test_cache_directory_that_fails_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    """A cache is an aid: what cannot be stored costs a warning, never the compile."""
    folder = tmp_path / "late"
    folder.mkdir(mode=0o700)
    (folder / "programs").write_text("in the way")
    (told,) = compile_with_cache(monkeypatch, folder, home)
    assert "nothing can be stored in the cache directory" in told
