"""Targets: text in, frozen description out."""

from __future__ import annotations

import pytest

from moec.targets import TargetError, cpu_cores, cpu_flags, detect_level, known_targets, parse_target


@pytest.mark.parametrize("text", known_targets())
def test_every_known_target_parses_to_itself(text: str) -> None:
    target = parse_target(text)
    assert str(target) == target.name == text
    assert target.flops_per_s("f32") > 0
    assert target.memory_bandwidth > 0
    assert target.memory > 0
    assert hash(target) == hash(parse_target(text))


def test_ranks() -> None:
    target = parse_target("cuda:sm90, ranks=8")
    assert (target.kind, target.ranks, str(target)) == ("cuda", 8, "cuda:sm90,ranks=8")
    assert parse_target(str(target)) == target


def test_cores_scale_the_rate() -> None:
    one, four = parse_target("cpu:avx2,cores=1"), parse_target("cpu:avx2,cores=4")
    assert four.flops_per_s("f32") == pytest.approx(4 * one.flops_per_s("f32"))
    assert four.cores == 4


def test_the_cpu_at_hand() -> None:
    target = parse_target("cpu")
    assert target.features == cpu_flags()
    assert target.cores == cpu_cores()
    assert f"cpu:{detect_level()}" in known_targets()


def test_lower_precision_is_no_slower() -> None:
    for text in ("cuda:sm90", "cpu:amx", "ascend:910b"):
        target = parse_target(text)
        assert target.flops_per_s("bf16") >= target.flops_per_s("f32")
    assert parse_target("cuda:sm80").flops_per_s("f8e4m3fn") == parse_target("cuda:sm80").flops_per_s("f32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpux", "did you mean 'cpu'"),
        ("cpu:avx51", "did you mean 'cpu:avx512'"),
        ("cuda", "targets: cuda:sm80"),
        ("cuda:sm91", "did you mean 'cuda:sm90'"),
        ("", "targets: cpu"),
        ("cuda:sm90,rank=8", "did you mean 'ranks'"),
        ("cuda:sm90,ranks=0", "number from 1 up"),
        ("cuda:sm90,ranks", "number from 1 up"),
        ("cuda:sm90,ranks=²", "number from 1 up"),
        ("cuda:sm90,cores=3", "fixed number of cores"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_target(text)
    assert message in str(caught.value)
