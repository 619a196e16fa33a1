"""Weights on huge pages: same addresses, same numbers, and the kernel of the system says where they lie."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import moec
from moec.backends.cpu import huge_pages as low
from moec.ir.errors import MoecError

MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked of Linux")


def on_huge_pages(t: torch.Tensor) -> int:
    """Bytes of the mappings that a tensor touches that lie on huge pages, as the system counts them."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) < t.data_ptr() + t.nbytes and t.data_ptr() < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


@linux
def test_weights_move_and_stay_what_and_where_they_are() -> None:
    model = torch.nn.Linear(2048, 4096, bias=False)  # 32 MB
    where, what = model.weight.data_ptr(), model.weight.detach().clone()
    steps: list[tuple[int, int]] = []
    report = moec.huge_pages(model, progress=lambda done, total: steps.append((done, total)))
    assert model.weight.data_ptr() == where
    assert torch.equal(model.weight, what)
    assert report.moved + sum(report.left.values()) == 32 * MB
    assert steps[-1] == (32 * MB, 32 * MB)
    if report.left.keys() - {"no whole huge page"}:
        pytest.skip(f"this machine has none: {report}")
    assert report.moved >= 28 * MB
    assert on_huge_pages(model.weight) >= report.moved
    assert "on huge pages" in str(report)


def test_tied_weights_and_views_are_moved_once() -> None:
    weight = torch.zeros(1 << 20)
    report = moec.huge_pages([weight, weight[10:], weight.view(-1, 2).t()])
    assert report.moved + sum(report.left.values()) == 4 * MB


def test_what_cannot_be_moved_is_told(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(4 * MB))
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=4 * MB, dtype=torch.uint8)
    assert mapped.sum() == 0
    report = moec.huge_pages([mapped, torch.empty(MB, device="meta"), torch.zeros(3)])
    assert report.moved == 0
    assert sum(report.left.values()) == 8 * MB + 12
    assert any("meta" in reason for reason in report.left)
    assert any("whole huge page" in reason for reason in report.left)
    assert "left as they were" in str(report)


@pytest.mark.parametrize("nothing", [[], torch.nn.ReLU(), [1, 2]])
def test_nothing_to_move_is_an_error(nothing: object) -> None:
    with pytest.raises(MoecError, match="nothing to move"):
        moec.huge_pages(nothing)  # type: ignore[arg-type]


def test_whole_pages_inside() -> None:
    assert low.inside(1, 4 * MB) == (2 * MB, 2 * MB)
    assert low.inside(2 * MB, 2 * MB) == (2 * MB, 2 * MB)
    assert low.inside(2 * MB + 1, 2 * MB)[1] == 0
    assert list(low.move(2 * MB + 1, 100)) == [(100, "no whole huge page")]
