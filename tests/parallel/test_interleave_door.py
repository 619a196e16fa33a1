"""Steps of two micro-batches through the compile door on two ranks: forward and backward are put in order, bits stay.

The ranks have other numbers of tokens, and so other graphs; the reference is the same step in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.parallel import interleave_ranks as ranks
from tests.support.processes import run_processes

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

DEADLINE = 300.0
Results = list[dict[str, Any]]


def _run(main: Callable[[int, str], None], folder: Path) -> Results:
    found = run_processes(main, ranks.RANKS, folder, DEADLINE)
    for results in found:
        for name, case in results.items():
            assert "error" not in case, f"{name}: {case['error']}"
            assert case["left"] == 0, f"{name}: every layer that was begun is at its end"
            assert case.get("same", True), f"{name}: bits differ"
    for name, case in found[0].items():
        assert case["orders"] == found[1][name]["orders"], f"{name}: ranks begin other collectives"
        assert case["remarks"] == found[1][name]["remarks"], f"{name}: ranks decide otherwise"
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _run(ranks.quick, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _run(ranks.long, tmp_path_factory.mktemp("long"))


def both_in_turns(case: dict[str, Any], layers: int) -> None:
    forward, backward = case["orders"]
    assert [n for n, _ in forward if n != "all_reduce"][:2] == ["begin_layer"] * 2
    assert [n for n, _ in backward if n != "all_reduce"][:2] == ["begin_gradients"] * 2
    assert case["ran"]["moec::begin_layer"] == case["ran"]["moec::begin_gradients"] == 2 * layers
    assert "moec::experts" not in case["ran"] and "moec::experts_backward" not in case["ran"]


def test_a_training_step(quick: Results) -> None:
    case = quick[0]["training"]
    both_in_turns(case, layers=1)
    assert [r.partition(": interleave-layers: ")[2].partition(":")[0] for r in case["remarks"]] == [
        "forward",
        "backward",
    ]
    assert all(r.startswith("applied") for r in case["remarks"])
    waits = [n for n, _ in case["orders"][1]]
    between = waits[waits.index("begin_gradients") : waits.index("end_gradients")]
    assert "all_reduce" in waits and between.count("begin_gradients") == 2, "both are under way at once"


def test_without_gradients_there_is_one_graph(quick: Results) -> None:
    case = quick[0]["inference"]
    assert len(case["orders"]) == len(case["remarks"]) == 1
    assert case["ran"]["moec::begin_layer"] == 2


def test_nobody_orders_what_runs_eagerly(quick: Results) -> None:
    case = quick[0]["eager"]
    assert case["orders"] == [] and case["ran"]["moec::experts"] == 2
    assert "makes no graphs of forward and backward" in case["remarks"][0]


def test_it_is_done_where_it_pays(quick: Results) -> None:
    done, left = quick[0]["pays"], quick[0]["does_not_pay"]
    assert len(done["orders"]) == 2 and left["orders"] == []
    assert all("applied" in r and " instead of " in r for r in done["remarks"]), done["remarks"]
    assert all("missed" in r and "stays in turn: so it takes " in r for r in left["remarks"]), left["remarks"]
    assert len(done["remarks"]) == len(left["remarks"]) == 2
    assert ranks.same(done, left)


@pytest.mark.slow
def test_inductor_keeps_the_order(long: Results) -> None:
    both_in_turns(long[0]["inductor"], layers=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("dependent", "forward: nothing large could run meanwhile"),
        ("written", "forward: nothing large could run meanwhile"),
        ("random", "forward: dropout has an effect and must keep its place"),
        ("nested", "layers lie in nested graphs"),
    ],
)
def test_what_stays_in_turn(case: str, why: str, long: Results) -> None:
    found = long[0][case]
    assert any(why in r for r in found["remarks"]), found["remarks"]
    assert "moec::begin_layer" not in found["ran"]


@pytest.mark.slow
def test_a_batch_without_gradients_has_no_backward(long: Results) -> None:
    found = long[0]["grad_modes"]
    assert found["ran"]["moec::begin_layer"] == 2 and found["ran"]["moec::experts_backward"] == 1
    assert "there are no two layers" in found["remarks"][1]
