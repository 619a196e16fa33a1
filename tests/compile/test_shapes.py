"""Many lengths and routings: never more graphs than ``backend="eager"`` makes, and right at every length."""

from __future__ import annotations

import pytest
import torch

import moec
from tests.compile.watch import Graphs, Watch, moec_compile
from tests.support.models import FAMILIES, VOCAB, build
from tests.support.routing import compare_logits, near_tie_tokens

LENGTHS = (64, 1000, 7, 2, 1)
OTHER_ORDER = (2, 64, 1, 1000, 7)
SKEWED = 0.5  # share of tokens that choose as the last one does; 1/56 of them would by chance


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


def one_token_again_and_again(length: int) -> torch.Tensor:
    """Equal tokens attend to equal values: positions are alike (after a few, with a convolution) and choose alike."""
    return torch.full((1, length), 5)


@torch.no_grad()
def check(family: str, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32, inner: str = "eager") -> None:
    model = build(family, dtype=dtype, layers=1)
    calls = [make(length) for make in (tokens, one_token_again_and_again) for length in lengths]
    graphs = Graphs()
    counted = torch.compile(model, backend=graphs)
    for ids in calls:
        counted(input_ids=ids)
    torch._dynamo.reset()

    seen = Watch(model)
    compiled = moec_compile(model, inner=inner, fullgraph=False, watch=seen)
    with moec.recording() as report:
        for ids in calls:
            got = compiled(input_ids=ids).logits
            compare_logits(got, model(input_ids=ids).logits, ties=near_tie_tokens(model, input_ids=ids))
    assert report.graphs <= graphs.count
    assert len(report.layers) == report.graphs
    assert report.all_fused, report
    assert not seen.expert_reads
    routed = [ids for ids in seen.ids if ids.shape[1] > 1]  # a shared expert is one expert that every token goes to
    assert len(routed) == len(calls)
    skewed = next(ids for ids in reversed(routed) if ids.shape[0] == max(lengths))
    assert (skewed == skewed[-1]).all(dim=1).float().mean() > SKEWED


def test_lengths_in_falling_order() -> None:
    check("mixtral", LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mixtral", "qwen3_next")])
def test_lengths_in_another_order(family: str) -> None:
    check(family, OTHER_ORDER)


@pytest.mark.slow
def test_model_with_a_loop_over_chunks() -> None:
    """Qwen3-Next's first layer unrolls a loop over chunks of 64 tokens: one graph for each number of chunks."""
    check("qwen3_next", LENGTHS)


@pytest.mark.slow
def test_lengths_in_bf16_through_inductor() -> None:
    check("mixtral", LENGTHS, torch.bfloat16, "inductor")
