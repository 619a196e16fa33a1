"""Measured launches: timed by whoever runs them, kept for the device they were measured on and no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moec.backends.base import program_op
from moec.backends.triton.launches import tuned
from moec.backends.triton.launches.device import Device, device_of
from moec.backends.triton.launches.here import Properties, described
from moec.backends.triton.launches.launch import candidates, plan_launch, tune
from moec.backends.triton.launches.tiles import Launch
from moec.backends.triton.launches.usage import fits
from moec.backends.triton.spec import Spec, read_spec
from moec.cache import cache_dir
from moec.ir.parser import parse_graph

TEXT = """
graph @layer(%x: bf16[T, 512], %ids: i64[T, 2], %w: f32[T, 2], %up: bf16[8, 1024, 512], %down: bf16[8, 512, 1024])
    -> bf16[T, 512] {
  %y = moe.experts %x, %ids, %w, [%up], [%down] {experts = 8, layout = "single"} {
   (%g: bf16[R, 1024]) -> bf16[R, 1024] {
    %m = torch.call @aten.relu.default(%g) : bf16[R, 1024]
    return %m } } : bf16[T, 512]
  return %y
}
"""


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEC_CACHE_DIR", str(tmp_path / "cache"))
    tuned._read.cache_clear()


@pytest.fixture
def spec() -> Spec:
    return read_spec(program_op(parse_graph(TEXT)))


def here(name: str = "one") -> Device:
    return described("cuda:sm90", Properties(units=132), name)


def test_candidates_fit_and_begin_with_the_models(spec: Spec) -> None:
    for tokens in (1, 700):
        found = candidates(spec, tokens, here())
        assert found[0] == plan_launch(spec, tokens, here()).launch
        assert 4 <= len(found) <= 12
        assert len(set(found)) == len(found)
        assert all(fits(here(), t, 1, "bf16") for c in found if c.form == "gemm" for t in (c.up, c.down))


def test_the_fastest_is_kept_for_this_device(spec: Spec) -> None:
    first, _, third, *_ = candidates(spec, 700, here())
    asked: list[Launch] = []

    def timer(launch: Launch) -> float:
        asked.append(launch)
        return 1e-5 if launch == third else 1e-3

    assert tune(spec, 700, here(), timer) == third
    assert asked == candidates(spec, 700, here("two"))
    again = plan_launch(spec, 900, here())  # 700 and 900 are both launched as 1024
    assert again.launch == third
    assert again.parts[0][:2] == ("measured", 1e-5)
    assert plan_launch(spec, 2000, here()).launch != third
    assert plan_launch(spec, 900, here("two")).launch == first
    assert plan_launch(spec, 900, device_of("cuda:sm90")).launch == first


def test_launches_that_cannot_run_are_left_out(spec: Spec) -> None:
    model = plan_launch(spec, 700, here()).launch
    assert tune(spec, 700, here(), lambda launch: float("inf")) == model
    assert not (cache_dir() / "triton" / "tuned").exists()
    second = candidates(spec, 700, here())[1]
    assert tune(spec, 700, here(), lambda launch: 1.0 if launch == second else float("inf")) == second


def test_what_is_kept_may_be_damaged(spec: Spec) -> None:
    tune(spec, 700, here(), lambda launch: 1.0 if launch.up.block_m == 64 else 2.0)
    model = plan_launch(spec, 700, replace(here(), fingerprint="")).launch
    (path,) = (cache_dir() / "triton" / "tuned").iterdir()
    for text in ("{", "[]", json.dumps({k: {"form": "gemm"} for k in json.loads(path.read_text())})):
        path.write_text(text)
        tuned._read.cache_clear()
        assert plan_launch(spec, 700, here()).launch == model


def test_fingerprints_tell_devices_apart() -> None:
    one = tuned.fingerprint("H100", "cuda:sm90", 132, 80e9, "2.13 3.9")
    assert one == tuned.fingerprint("H100", "cuda:sm90", 132, 80e9, "2.13 3.9")
    others = [("H200", 132, "2.13 3.9"), ("H100", 114, "2.13 3.9"), ("H100", 132, "2.13 4.0")]
    assert one not in {tuned.fingerprint(n, "cuda:sm90", u, 80e9, v) for n, u, v in others}
