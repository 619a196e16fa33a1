"""Shared links: fair rates are feasible and cannot be raised, bytes are conserved, no link carries more than it can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.simulate.network import Network, fair_rates

LINKS = 5
EXACT = 1e-9  # relative; sums of floats
GRAINED = 0.05  # flows that end together end up to 2 % of their age late, one after another

ways = st.lists(st.lists(st.integers(0, LINKS - 1), min_size=1, max_size=3, unique=True), min_size=1, max_size=12)
speeds = st.lists(st.floats(0.5, 20.0), min_size=LINKS, max_size=LINKS)


def filled(found: list[list[int]]) -> np.ndarray:
    width = max(map(len, found))
    return np.array([w + [LINKS] * (width - len(w)) for w in found])


@given(ways, speeds)
@settings(max_examples=80, deadline=None)
def test_rates_are_feasible_and_max_min_fair(found: list[list[int]], bandwidth: list[float]) -> None:
    rates = fair_rates(np.array([*bandwidth, np.inf]), filled(found))
    carried = np.zeros(LINKS)
    for way, rate in zip(found, rates, strict=True):
        carried[way] += rate
    assert (carried <= np.array(bandwidth) * (1 + EXACT)).all()
    for way, rate in zip(found, rates, strict=True):  # every flow has a full link on which none is faster
        assert any(
            carried[k] >= bandwidth[k] * (1 - EXACT)
            and rate >= max(r for w, r in zip(found, rates, strict=True) if k in w) * (1 - EXACT)
            for k in way
        )


def test_a_known_case() -> None:
    """Three flows on two links of 10 and 4: the one that crosses both and the one on the slow link get 2 each."""
    rates = fair_rates(np.array([10.0, 4.0, np.inf]), np.array([[0, 2], [0, 1], [1, 2]]))
    assert rates.tolist() == [8.0, 2.0, 2.0]


@given(ways, speeds, st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_are_conserved_and_no_link_is_overfilled(
    found: list[list[int]], bandwidth: list[float], data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.floats(0.1, 50.0), min_size=len(found), max_size=len(found)))
    starts = data.draw(st.lists(st.floats(0.0, 5.0), min_size=len(found), max_size=len(found)))
    net = Network(bandwidth, found, sizes, grain=0.0, watch=True)
    run(net, starts)
    assert net.segments is not None
    assert not np.isnan(net.ended).any()
    total = np.zeros(LINKS)
    for begin, end, carried in net.segments:
        assert (carried <= np.array(bandwidth) * (1 + EXACT)).all()
        total += carried * (end - begin)
    wanted = np.zeros(LINKS)
    for way, size in zip(found, sizes, strict=True):
        wanted[way] += size
    assert total == pytest.approx(wanted, rel=1e-6)
    for way, size, begin, end in zip(found, sizes, starts, net.ended, strict=True):
        assert end - begin >= size / min(bandwidth[k] for k in way) * (1 - 1e-6)


def run(net: Network, starts: list[float]) -> None:
    """Let every flow begin at its time, and run to the end."""
    waiting = sorted(range(len(starts)), key=lambda i: starts[i])
    while waiting or net.next_end() < np.inf:
        nearest = starts[waiting[0]] if waiting else np.inf
        time = min(nearest, net.next_end())
        net.run_to(time)
        while waiting and starts[waiting[0]] <= time:
            net.begin([waiting.pop(0)])


def test_ends_that_fall_together_are_late_and_never_early() -> None:
    """200 flows of different sizes through one link: exact, and in grains."""
    sizes = np.linspace(1.0, 3.0, 200).tolist()
    exact, grained = (Network([1.0], [[0]] * 200, sizes, grain=g) for g in (0.0, 0.02))
    for net in (exact, grained):
        run(net, [0.0] * 200)
    assert exact.ended.max() == pytest.approx(sum(sizes))
    assert (grained.ended >= exact.ended * (1 - EXACT)).all()
    assert grained.ended.max() <= exact.ended.max() * (1 + GRAINED)
    assert len(set(grained.ended.tolist())) < len(set(exact.ended.tolist()))
