"""The routing profile: what is recorded, how it is kept, when it shows clusters, and what the pass makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.ir.parser import parse_graph
from moec.passes import PassContext, PassManager
from moec.passes.overlap.costs import RoutingLoads
from moec.routing.profile import Clusters, LayerRouting, RoutingProfile, Trial
from moec.routing.record import profile_routing, transitions
from moec.routing.store import RoutingError, from_json, load_routing, save_routing, to_json
from moec.routing.trials import shuffled, try_regrouping
from tests.compile.blocks import EXPERTS, HIDDEN, TOP_K, Block, Layers
from tests.ir.test_regroup import planted

GRAPH = """
graph @two(%x0: f32[A, 4], %ids0: i64[A, 2], %p0: f32[A, 2], %x1: f32[B, 4], %ids1: i64[B, 2], %p1: f32[B, 2],
    %w1: f32[32, 6, 4], %w2: f32[32, 4, 6]) -> (f32[A, 4], f32[B, 4]) {
  %a = moe.experts %x0, %ids0, %p0, [%w1], [%w2] {experts = 32, layout = "single"} {
    @activation(%h: f32[R, 6]) -> f32[R, 6] {
      return %h
    }
  } : f32[A, 4]
  %b = moe.experts %x1, %ids1, %p1, [%w1], [%w2] {experts = 32, layout = "single"} {
    @activation(%h: f32[R, 6]) -> f32[R, 6] {
      return %h
    }
  } : f32[B, 4]
  return %a, %b
}
"""


def profile_with(clusters: Clusters, experts: int = 32, top_k: int = 2) -> RoutingProfile:
    layer = LayerRouting("l", experts, top_k, (1,) * experts, clusters=(clusters,))
    return RoutingProfile("m", 16, 1, 2, (layer,))


def drawn(seed: int, tokens: int, skewed: bool) -> Any:
    """Tokens with nothing in common but the loads of experts."""
    draw = np.random.default_rng(seed)
    chance = draw.dirichlet(np.full(32, 0.5)) + 1e-4 if skewed else np.full(32, 1.0)
    return np.array([draw.choice(32, 2, replace=False, p=chance / chance.sum()) for _ in range(tokens)])


def run(profile: RoutingProfile | None, options: str = "") -> tuple[str, list[str]]:
    graph, ctx = parse_graph(GRAPH), PassContext(profile=profile)
    PassManager(f"reschedule-tokens{options}", repro=None).run(graph, ctx)
    return str(graph), [str(r) for r in ctx.remarks]


class Sequences(torch.nn.Module):
    """Two blocks on ``[sequences, tokens, HIDDEN]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers(Block(seed=1), Block(seed=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x.reshape(-1, HIDDEN))
        return out.view_as(x)


def chosen_by(model: Sequences, x: torch.Tensor) -> list[Any]:
    """The experts of both blocks, by the blocks' own arithmetic."""
    found, x = [], x.reshape(-1, HIDDEN)
    for block in model.layers.layers:
        found.append(torch.topk(torch.softmax(x @ block.router.T, -1), TOP_K, -1).indices.numpy())
        x = x + block(x)
    return found


def test_what_routers_do_is_recorded(tmp_path: Path) -> None:
    model = Sequences().eval()
    batches = [torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    profile = profile_routing(model, batches, sizes=(8,), ranks=(2,))
    with torch.no_grad():
        want = [np.concatenate(per) for per in zip(*(chosen_by(model, b) for b in batches), strict=True)]
    assert (profile.tokens, profile.sequences, profile.calls, len(profile.layers)) == (72, 6, 3, 2)
    assert [layer.name for layer in profile.layers] == ["layers.layers.0", "layers.layers.1"]
    for layer, ids in zip(profile.layers, want, strict=True):
        assert (layer.experts, layer.top_k) == (EXPERTS, TOP_K)
        assert layer.loads == tuple(np.bincount(ids.reshape(-1), minlength=EXPERTS))
        assert [m for m, _, _ in layer.srp] == [2, 4, 8]
        assert [(c.batches, c.ranks) for c in layer.clusters] == [(2, 0), (2, 2)]
    counts = np.zeros((EXPERTS, EXPERTS), int)
    for a, b in zip(*want, strict=True):
        counts[np.ix_(a, b)] += 1
    assert len(profile.transitions) == 1
    assert {(e, f): n for e, f, n in profile.transitions[0]} == {
        (e, f): int(n) for (e, f), n in np.ndenumerate(counts) if n
    }
    assert from_json(to_json(profile)) == profile
    assert load_routing(save_routing(profile, tmp_path / "p.json")) == profile


def test_rows_of_a_step_for_who_asks_by_the_layers_path() -> None:
    profile = profile_with(Clusters(2, 0, ()))
    assert isinstance(profile, RoutingLoads)
    assert profile.rows("l.experts", 3, 32) == profile.rows("l", 3, 32) == [[0.5] * 32] * 3
    assert profile.rows("layer", 3, 32) is None
    assert profile.rows("l", 3, 16) is None


def test_ids_of_no_expert_have_no_transitions() -> None:
    before, after = np.array([[0, 2], [1, -1]]), np.array([[0, 0], [1, 3]])
    assert transitions(before, after, 2, 3) == ((0, 0, 2), (1, 1, 1))


def test_shuffling_keeps_loads_and_gives_no_expert_twice() -> None:
    ids = planted(0, 64, 16, 4, 2, 0.0)
    found = shuffled(ids, np.random.default_rng(0))
    assert (np.bincount(found.reshape(-1)) == np.bincount(ids.reshape(-1))).all()
    assert all(len(set(row)) == 4 for row in found.tolist())
    assert (found != ids).any()


def test_planted_clusters_are_seen_and_the_pass_regroups() -> None:
    profile = profile_with(try_regrouping(planted(0, 1024, 32, 2, 4, 0.0), 32, sizes=(64, 128)))
    assert all(t.clustered for t in profile.layers[0].clusters[0].trials)
    text, remarks = run(profile)
    assert re.search(r"moe\.regroup \[%ids0, %ids1\] \{experts = 32, expert_bytes = \d+, least = \(\(64, 0\.", text)
    assert remarks == ["applied: reschedule-tokens: 2 micro-batches regrouped by experts"]


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_unclustered_tokens_change_nothing(seed: int, skewed: bool) -> None:
    profile = profile_with(try_regrouping(drawn(seed, 1024, skewed), 32, sizes=(16, 32, 64)))
    text, remarks = run(profile)
    assert text == str(parse_graph(GRAPH))
    assert len(remarks) == 1
    assert "the routing profile shows no clusters" in remarks[0]


def test_unclustered_tokens_stay_though_the_profile_shows_clusters() -> None:
    least = profile_with(try_regrouping(planted(0, 1024, 32, 2, 4, 0.0), 32, sizes=(128,))).least_saving(32, 2, 2, ())
    assert isinstance(least, tuple)
    graph = parse_graph(
        f"""graph @g(%a: i64[A, 2], %b: i64[A, 2]) -> i64[A] {{
      %p, %q, %r, %s = moe.regroup [%a, %b] {{experts = 32, least = {least}}} : i64[A], i64[A], i64[A], i64[A]
      return %p
    }}"""
    )
    from moec.backends.reference import run_graph

    def moved(ids: Any) -> bool:
        halves = torch.from_numpy(ids).split(64)
        return bool((run_graph(graph, halves)[0] != torch.arange(64)).any())

    assert not any(moved(drawn(seed, 128, False)) for seed in range(10))
    assert all(moved(planted(seed, 128, 32, 2, 4, 0.0)) for seed in range(10))


@pytest.mark.parametrize(
    ("experts", "top_k", "options", "says"),
    [
        (16, 2, "", "no layer with 32 experts and 2 a token"),
        (32, 4, "", "no layer with 32 experts and 2 a token"),
        (32, 2, "{batches=3,cut=true}", "no trials of 3 micro-batches and experts"),
    ],
)
def test_a_profile_of_something_else(experts: int, top_k: int, options: str, says: str) -> None:
    clusters = Clusters(2, 0, (Trial(32, 8, 0.3, 0.1, 0.01, 0.01),))
    text, remarks = run(profile_with(clusters, experts, top_k), options)
    assert text == str(parse_graph(GRAPH))
    assert says in remarks[0]


def test_trials_of_other_ranks_are_none() -> None:
    profile = profile_with(Clusters(2, 4, (Trial(32, 8, 0.3, 0.1, 0.01, 0.01),)))
    assert "no trials of 2 micro-batches and 2 ranks" in profile.least_saving(32, 2, 2, (16, 16))
    assert profile.least_saving(32, 2, 2, (8, 8, 8, 8)) == ((32, 0.13),)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: [], "it is no moec-routing"),
        (lambda d: {**d, "version": 7}, "it has version 7, and version 1 is read"),
        (lambda d: {k: v for k, v in d.items() if k != "layers"}, "it lacks 'layers'"),
        (lambda d: {**d, "layers": [{**d["layers"][0], "loads": [1]}]}, "1 loads of 32 experts"),
    ],
)
def test_files_that_are_no_profile(tmp_path: Path, change: Any, says: str) -> None:
    profile = profile_with(Clusters(2, 0, ()))
    path = tmp_path / "p.json"
    path.write_text(json.dumps(change(json.loads(to_json(profile)))))
    with pytest.raises(RoutingError, match="cannot be used") as error:
        load_routing(path)
    assert says in str(error.value)
    with pytest.raises(RoutingError, match="there is no routing profile"):
        load_routing(tmp_path / "none.json")


def test_sequences_of_one_length_and_a_layer_are_needed() -> None:
    with pytest.raises(RoutingError, match="no MoE layer ran"):
        profile_routing(torch.nn.Linear(4, 4), [torch.zeros(2, 4)])
    with pytest.raises(RoutingError, match="no input says what a sequence is"):
        profile_routing(Sequences(), [torch.zeros(4)])
