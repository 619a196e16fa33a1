"""This machine as a topology: a profile's own numbers, and a message where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.cost import LayerShape, predict, save_profile
from moec.cost.links import Link
from moec.cost.store import fingerprint
from moec.simulate.collectives import all_to_all
from moec.simulate.costs import Costs
from moec.simulate.errors import SimulationError
from moec.simulate.events import simulate
from moec.simulate.here import topology_of
from moec.simulate.steps import Collective, Start, Wait
from moec.simulate.topology import load_topology
from tests.cost.machines import round_machine

LINK = Link(1e-4, 2e9)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("MOEC_CACHE_DIR", str(folder))


def test_the_stored_profile_is_here() -> None:
    save_profile(round_machine(fingerprint=fingerprint(), links=((2, Link(1e-3, 1e9)), (4, LINK))))
    made = load_topology("here")
    assert (made.ranks, made.nodes) == (4, 1)
    assert made.inside == LINK
    assert made.device.target.memory_bandwidth == 1e9, "two cores read 2 GB/s together"
    assert made.device.target.flops_per_s("bf16") == 4e9


def test_an_all_to_all_takes_what_was_measured() -> None:
    made = topology_of(round_machine(links=((4, LINK),)))
    flows = tuple(all_to_all(range(4), [[1e6] * 4] * 4))
    found = simulate([[Start(0), Wait(0)]] * 4, [Collective("c", "ep", tuple(range(4)), flows)], made).seconds
    assert found == pytest.approx(LINK.seconds(3e6))


def test_experts_take_what_the_curve_says_with_all_cores_at_work() -> None:
    """Each of two ranks does alone what both cores did together: twice the curve of two threads."""
    machine = round_machine(links=((2, LINK),))
    shape = LayerShape(64, 32, 64, experts=2, top_k=1, dtype="bf16")
    curve = Costs(topology_of(machine).device).curve_of(shape)
    assert curve.launch_s == machine.call_seconds
    eight, four = ([4] * n + [0] * (8 - n) for n in (8, 4))
    of = LayerShape(64, 32, 64, experts=8, top_k=1, dtype="bf16")
    one = (predict(of, eight, machine, 2).seconds - predict(of, four, machine, 2).seconds) / 4
    assert curve.seconds([4, 4]) == pytest.approx(machine.call_seconds + 2 * 2 * one)


def test_not_measured() -> None:
    with pytest.raises(SimulationError, match="this machine was not measured"):
        load_topology("here")
    save_profile(round_machine(fingerprint=fingerprint()))
    with pytest.raises(SimulationError, match="no links between processes"):
        load_topology("here")


def test_links_between_real_processes() -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    from moec.calibration.links import measure_links

    link = measure_links(2)
    assert 1e-6 < link.alpha_s < 1
    assert 1e5 < link.bytes_per_s < 1e12


def test_processes_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moec.calibration import links
    from moec.cost import ProfileError

    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(links.sys, "executable", str(broken))
    with pytest.raises(ProfileError, match="links between processes could not be measured: no such thing"):
        links.measure_links(2)
