"""Links: by hand."""

from __future__ import annotations

import pytest

from moec.cost.links import Link, busiest


def test_latency_and_bandwidth_add_up() -> None:
    link = Link(alpha_s=1e-5, bytes_per_s=1e9)
    assert link.seconds(1e6) == pytest.approx(1.01e-3)
    assert link.seconds(1e6, messages=3) == pytest.approx(1.03e-3)
    assert link.seconds(0) == pytest.approx(1e-5), "an empty message is one"
    assert link.seconds(0, messages=0) == 0.0


@pytest.mark.parametrize(("alpha", "rate"), [(-1e-6, 1e9), (1e-6, 0.0), (float("nan"), 1e9)])
def test_impossible_links_are_refused(alpha: float, rate: float) -> None:
    with pytest.raises(ValueError, match="a link has"):
        Link(alpha, rate)


def test_the_busiest_rank_decides() -> None:
    assert busiest([[9, 1], [4, 9]]) == 4, "what a rank keeps travels nowhere"
    assert busiest([[0, 2, 3], [1, 0, 1], [7, 1, 0]]) == 8, "rank 0 receives 1 + 7, rank 2 sends 7 + 1"
    assert busiest([[5]]) == 0
    assert busiest([]) == 0
