"""Curves of a layer's experts: by hand, monotone, and held to the layer model that they come from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.cost import LayerShape, defaults_for, predict
from moec.cost.curve import LAUNCH_S, LayerCurve, assumed_curve, measured_curve
from moec.cost.products import EFFICIENCY
from moec.targets import parse_target

QWEN = LayerShape(hidden=2048, inner=768, width=2048, experts=128, top_k=8)


def test_between_below_and_past_the_points() -> None:
    curve = LayerCurve(0.5, ((2.0, 1.0), (4.0, 3.0)))
    assert [curve.expert_seconds(r) for r in (0, 1, 2, 3, 4, 8)] == [0.0, 0.5, 1.0, 2.0, 3.0, 6.0]
    assert curve.seconds([2, 0, 4]) == 4.5
    assert curve.seconds([0, 0]) == 0.0, "no row, no call"
    assert curve.times(2).seconds([2, 4]) == 8.5


@pytest.mark.parametrize("points", [(), ((0.0, 1.0),), ((2.0, 1.0), (2.0, 2.0)), ((1.0, 2.0), (2.0, 1.0))])
def test_curves_that_fall_are_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError):
        LayerCurve(0.0, points)


def test_a_device_reads_weights_first_and_fills_tiles_after() -> None:
    target = parse_target("cuda:sm90")
    curve = assumed_curve(QWEN, target)
    weights = QWEN.elements * 2 / target.memory_bandwidth
    row = 2 * QWEN.elements / (target.flops_per_s("bf16") * EFFICIENCY)
    written = 2 * (QWEN.inner + QWEN.width) / target.memory_bandwidth
    assert curve.launch_s == LAUNCH_S
    assert curve.expert_seconds(1) == pytest.approx(max(weights, 128 * row + written))
    assert curve.expert_seconds(513) == pytest.approx(640 * row + 513 * written)
    assert curve.expert_seconds(640) == pytest.approx(640 * (row + written))
    assert curve.expert_seconds(64 * 128 * 2) == pytest.approx(64 * 128 * 2 * (row + written))


def test_results_are_written_under_the_next_tiles_sum_on_other_devices() -> None:
    target = parse_target("cuda:sm100")
    row = 2 * QWEN.elements / (target.flops_per_s("bf16") * EFFICIENCY)
    assert assumed_curve(QWEN, target).expert_seconds(640) == pytest.approx(640 * row)


def test_on_a_processor_the_curve_is_the_layers_model() -> None:
    machine = defaults_for(parse_target("cpu:avx512,cores=8"))
    curve = measured_curve(QWEN, machine, 1)
    for load in ([64] * 128, [0] * 100 + [48] * 28):
        assert curve.seconds(load) == pytest.approx(predict(QWEN, load, machine, 1).seconds, rel=0.02)


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.sampled_from(["cuda:sm80", "cuda:sm90", "ascend:910b"]))
def test_more_rows_take_no_less_time(a: float, b: float, name: str) -> None:
    curve = assumed_curve(QWEN, parse_target(name))
    low, high = sorted((a, b))
    assert curve.expert_seconds(low) <= curve.expert_seconds(high) * (1 + 1e-9)
