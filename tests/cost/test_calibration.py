"""Calibration against a clock that is the model itself: what was put in must come out."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from moec.backends.cpu.isa import LEVELS
from moec.calibration import measure, times
from moec.calibration.times import Times, take_times
from moec.cost import GemmCurve, LayerShape, MachineProfile, predict
from moec.cost.machine import ROWS, Overhead

TRUE = MachineProfile(
    name="true",
    fingerprint="",
    cores=4,
    isa="avx2",
    calibrated=True,
    bandwidth=((1, 1e10), (2, 2e10), (4, 3e10)),
    flops=(("f32", "avx2", 1e11),),
    curves=tuple(
        GemmCurve("f32", "avx2", t, tuple((r, 0.5 * (1 / 3 if t == 4 else 1) + 0.03 * r / t) for r in ROWS))
        for t in (1, 4)
    ),
    call_seconds=50e-6,
    barriers=((1, 0.0), (2, 5e-6), (4, 9e-6)),
    overheads=(Overhead("f32", ((1, 1e-6), (4, 1e-7)), ((1, 2e-10), (4, 1e-10))),),
)


class Clock:
    """A layer whose calls take as long as ``TRUE`` says."""

    def __init__(self, shape: LayerShape, least_bytes: float = 0.0) -> None:
        self.shape = shape

    def tokens(self, count: int) -> torch.Tensor:
        return torch.empty(count, 0)

    def seconds(self, x: torch.Tensor, ids: torch.Tensor) -> float:
        rows = torch.bincount(ids.flatten(), minlength=self.shape.experts).tolist()
        return predict(self.shape, rows, TRUE, torch.get_num_threads()).seconds

    def fixed_rows(self, rows: int, touched: int, threads: int, calls: int) -> Times:
        load = [rows] * touched + [0] * (self.shape.experts - touched)
        seconds = predict(self.shape, load, TRUE, threads).seconds
        return Times([seconds, seconds, 3 * seconds], [9.0])


class Probes:
    """What probes find on ``TRUE``."""

    def __init__(self, isa: object) -> None:
        pass

    def flops_per_s(self, dtype: str) -> float:
        return TRUE.flops_per_s(dtype, "avx2", 1)

    def bytes_per_s(self, threads: int) -> float:
        return TRUE.bytes_per_s(threads)

    def region_seconds(self, threads: int) -> float:
        return TRUE.barriers_at(threads)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> MachineProfile:
    monkeypatch.setattr(measure, "SyntheticLayer", Clock)
    monkeypatch.setattr(measure, "Probes", Probes)
    monkeypatch.setattr(measure, "isa_of", lambda target: LEVELS["avx2"])
    return measure.calibrate(4, ["f32"])


def test_probes_are_kept_as_found(found: MachineProfile) -> None:
    assert found.calibrated
    assert (found.bandwidth, found.flops, found.barriers) == (TRUE.bandwidth, TRUE.flops, TRUE.barriers)
    assert found.call_seconds == pytest.approx(TRUE.call_seconds, rel=0.05)  # a tiny GEMM is in it


def test_parts_are_told_apart(found: MachineProfile) -> None:
    for threads in (1, 4):
        assert found.row_byte_seconds("f32", threads) == pytest.approx(TRUE.row_byte_seconds("f32", threads), rel=0.1)
        assert found.task_seconds("f32", threads) == pytest.approx(TRUE.task_seconds("f32", threads), abs=5e-8)
    for threads in (1, 4):
        for rows in ROWS:
            want = TRUE.curve("f32", "avx2", threads).seconds(rows)
            assert found.curve("f32", "avx2", threads).seconds(rows) == pytest.approx(want, rel=0.02)


def test_layers_of_other_sizes_are_predicted(found: MachineProfile) -> None:
    for h, i, e, k in ((1024, 512, 64, 4), (4096, 3072, 8, 2), (2048, 768, 128, 8)):
        shape = LayerShape(h, i, h, e, k, dtype="f32")
        for tokens in (4, 64, 700):
            for threads in (1, 2, 4):
                want = predict(shape, tokens, TRUE, threads).seconds
                assert predict(shape, tokens, found, threads).seconds == pytest.approx(want, rel=0.02)


def test_interrupted_calls_are_counted_and_do_not_count(found: MachineProfile) -> None:
    assert found.interrupted == pytest.approx(0.25)


def test_calls_are_tried_again_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter(
        [0, 1, 1, 1, 1, 2, 2, 2]
    )  # before and after each call that counts: the first and third are interrupted
    monkeypatch.setattr(times, "waited", lambda: next(taken))
    got = take_times(float, 2)
    assert (got.clean, got.interrupted) == ([2.0, 4.0], [1.0, 3.0])
    assert got.seconds == 2.0


def test_on_a_busy_machine_the_better_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "waited", count(0).__next__)
    got = take_times(lambda n: 100.0 - n, 4)
    assert got.clean == []
    assert len(got.interrupted) == 16
    assert got.seconds == 100.0 - 12
