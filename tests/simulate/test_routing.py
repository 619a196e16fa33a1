"""What tokens choose: each expert once, shares as asked for, groups kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.routing.profile import LayerRouting, RoutingProfile
from moec.routing.store import RoutingError, save_routing
from moec.simulate.errors import SimulationError
from moec.simulate.routing import Routing

NEAR = 0.02  # of a share, of 20,000 choices


@given(
    st.sampled_from(["balanced", "uniform", "zipf:1.5"]), st.integers(0, 9), st.integers(1, 12), st.data(),
    st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_token_chooses_each_expert_once(text: str, tokens: int, experts: int, data: st.DataObject, rank: int) -> None:
    top_k = data.draw(st.integers(1, experts))
    ids = Routing.parse(text).ids(rank, tokens, top_k, experts)
    assert ids.shape == (tokens, top_k)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert not ids.numel() or (int(ids.min()) >= 0 and int(ids.max()) < experts)


def test_balanced_is_balanced() -> None:
    ids = torch.cat([Routing().ids(r, 6, 2, 8) for r in range(4)])
    assert torch.bincount(ids.flatten(), minlength=8).tolist() == [6] * 8


@pytest.mark.parametrize("text", ["uniform", "zipf:1", "zipf:2"])
def test_first_choices_have_the_shares(text: str) -> None:
    routing = Routing.parse(text)
    ids = routing.ids(0, 20_000, 1, 8)
    shares = torch.bincount(ids.flatten(), minlength=8) / 20_000
    assert torch.allclose(shares, routing.shares(8).float(), atol=NEAR)


def test_layers_and_ranks_draw_their_own() -> None:
    routing = Routing.parse("zipf:1.2")
    assert not torch.equal(routing.shares(16, 0), routing.shares(16, 1))
    assert not torch.equal(routing.ids(0, 9, 2, 16), routing.ids(1, 9, 2, 16))
    assert torch.equal(routing.ids(0, 9, 2, 16), routing.ids(0, 9, 2, 16))
    assert not torch.equal(routing.ids(0, 9, 2, 16), Routing.parse("zipf:1.2", seed=1).ids(0, 9, 2, 16))


def test_groups_are_kept() -> None:
    per = Routing.parse("zipf:1").ids(0, 50, 4, 16, groups=4, per_group=1)
    assert (per // 4 == torch.arange(4)).all()
    top = Routing.parse("uniform").ids(0, 50, 4, 16, groups=4, top_groups=2)
    assert all(len({e // 4 for e in row}) <= 2 for row in top.tolist())


def test_a_histogram(tmp_path: Path) -> None:
    file = tmp_path / "h.json"
    file.write_text(json.dumps([3, 0, 1, 0]))
    routing = Routing.parse(str(file))
    counts = torch.bincount(routing.ids(0, 4000, 1, 4).flatten(), minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor([0.75, 0.0, 0.25, 0.0]), atol=NEAR)
    with pytest.raises(SimulationError, match="is of 4 experts, a layer has 8"):
        routing.ids(0, 1, 1, 8)


def test_a_routing_profile_has_a_histogram_a_layer(tmp_path: Path) -> None:
    layers = (LayerRouting("a", 2, 1, (1, 0)), LayerRouting("b", 2, 1, (0, 5)))
    file = save_routing(RoutingProfile("m", 6, 1, 1, layers), tmp_path / "p.json")
    routing = Routing.parse(str(file))
    assert [routing.ids(0, 3, 1, 2, layer=n).flatten().tolist() for n in range(3)] == [[0] * 3, [1] * 3, [0] * 3]
    file.write_text(file.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(RoutingError, match="cannot be used: it has version 99"):
        Routing.parse(str(file))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("zipff", "unknown skew 'zipff'; did you mean 'zipf:1.2'"),
        ("zipf:x", "unknown skew"),
        ("zipf:-1", "unknown skew"),
        ("none.json", "cannot be read"),
    ],
)
def test_a_skew_that_is_none(text: str, says: str) -> None:
    with pytest.raises(SimulationError, match=says):
        Routing.parse(text)


@pytest.mark.parametrize("content", ["[]", "[1, -1]", "[0, 0]", '["a"]', "[[1]]", "3"])
def test_a_file_without_a_histogram(content: str, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(content)
    with pytest.raises(SimulationError, match="holds no histogram"):
        Routing.parse(str(tmp_path / "h.json"))


def test_more_choices_than_experts() -> None:
    with pytest.raises(SimulationError, match="cannot choose 3 of 2 experts"):
        Routing().ids(0, 1, 3, 2)
