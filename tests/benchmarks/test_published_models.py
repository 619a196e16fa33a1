"""Schedules of whole models: by hand where all or nothing is hidden, and between their bounds for any parts."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.simulate import load_topology

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = load_topology("8xh100")
SLACK = 1 + 1e-9
seconds = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))


@pytest.fixture(scope="module")
def overlap() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("published_overlap")


def parts(overlap: ModuleType, *each: float, slower: float = 1.0, gradients: float = 0.0) -> object:
    """Of attention, shared expert, experts, rows there and rows back."""
    attention, shared, experts, there, back = each
    computed = [(s, s * slower) for s in (attention, shared, experts)]
    return overlap.Parts(*computed, there, back, gradients)


def test_one_batch_is_the_sum_of_its_parts(overlap: ModuleType) -> None:
    assert overlap.one_batch(parts(overlap, 3, 1, 2, 0.5, 0.25), 3).seconds(TOPOLOGY) == pytest.approx(3 * 6.75)


def test_two_batches_hide_what_is_shorter(overlap: ModuleType) -> None:
    hidden = parts(overlap, 3, 1, 2, 0.5, 0.25)
    assert overlap.layer_seconds(TOPOLOGY, overlap.two_batches, hidden) == pytest.approx(2 * 6)
    bound = parts(overlap, 0.3, 0.1, 0.2, 5, 2)
    assert overlap.layer_seconds(TOPOLOGY, overlap.two_batches, bound) == pytest.approx(2 * 7)
    slowed = parts(overlap, 3, 1, 2, 3, 2, slower=1.25)  # a fifth of what would be done beside 10 s of rows is not
    assert overlap.layer_seconds(TOPOLOGY, overlap.two_batches, slowed) == pytest.approx(2 * 6 + 10 / 5)


def test_a_forward_hides_the_rows_of_a_backward(overlap: ModuleType) -> None:
    hidden = parts(overlap, 3, 1, 2, 0.5, 0.25, gradients=0.7)
    computed = 3 * (1 + 2.5) + 3 * (1 + 2) + 0.7
    assert overlap.layer_seconds(TOPOLOGY, overlap.forward_beside_backward, hidden) == pytest.approx(computed)
    apart = overlap.layer_seconds(TOPOLOGY, overlap.forward_and_backward, hidden)
    assert apart == pytest.approx(computed + 2 * 0.75)


@given(seconds, seconds, seconds, seconds, seconds)
@settings(max_examples=60, deadline=None)
def test_schedules_lie_between_their_bounds(
    overlap: ModuleType, attention: float, shared: float, experts: float, there: float, back: float
) -> None:
    given_parts = parts(overlap, attention, shared, experts, there, back)
    computed, sent = attention + shared + experts, there + back
    two = overlap.two_batches(given_parts, 3).seconds(TOPOLOGY)
    assert 3 * 2 * max(computed, sent) <= two * SLACK
    assert two <= 2 * overlap.one_batch(given_parts, 3).seconds(TOPOLOGY) * SLACK
    beside = overlap.forward_beside_backward(given_parts, 3).seconds(TOPOLOGY)
    assert 3 * max(3 * (shared + experts) + 3.5 * attention, 2 * sent) <= beside * SLACK
    assert beside <= overlap.forward_and_backward(given_parts, 3).seconds(TOPOLOGY) * SLACK


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=4, max_size=4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_messages_carry_every_row_once(overlap: ModuleType, table: list[list[int]], own: bool) -> None:
    """Rows that stay are messages to oneself where the kernel moves them; never else."""
    found = importlib.import_module("published_parts").messages(np.array(table), own)
    carried = np.zeros((4, 4))
    for flow in found:
        carried[flow.source, flow.to] += flow.bytes
    want = np.array(table) if own else np.array(table) * (1 - np.eye(4))
    assert carried.tolist() == want.tolist()


def test_attention_of_deepseek_v3_has_its_weights(overlap: ModuleType) -> None:
    model = overlap.MODELS["deepseek-v3"]
    weights = sum(p.inputs * p.outputs for p in model.attention.products(1))
    assert weights == 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168
    assert model.layers + model.dense == 61
