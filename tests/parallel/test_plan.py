"""Plans as text, what becomes of one rank, and the planner's foldings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import moec
from moec.ir.parallel_semantics import chunk_sizes, owners
from moec.parallel import ParallelError, Plan, layout_of
from moec.parallel.attention import split_heads
from moec.parallel.experts import expert_parameters
from moec.parallel.formula import expected_bytes, layer_bytes
from moec.parallel.planner import ModelFacts, foldings
from moec.passes.interleave_layers import InterleaveLayers
from moec.passes.overlap import Overlap
from moec.passes.reschedule_tokens import RescheduleTokens
from tests.compile.blocks import Block, Layers
from tests.parallel.heads import Decoder
from tests.support.models import build

FACTS = ModelFacts(
    experts=8, top_k=2, layers=2, hidden=64, inner=48, heads=4, kv_heads=2, attention_layers=2, element=4,
    expert_bytes=800_000, attention_bytes=100_000, other_bytes=50_000,
)  # fmt: skip


def test_a_plan_from_text() -> None:
    assert Plan.parse("ep=4") == Plan(ep=4)
    assert Plan.parse(" ep=8, nodes=2 ,form=hierarchical,sums=way") == Plan(8, 2, "hierarchical", "way")
    (one,) = Plan.parse("ep=4,tokens=equal").passes(1)
    assert (one.name, one.degree, one.rank, one.equal_tokens) == ("expert-parallel", 4, 1, True)  # type: ignore[attr-defined]
    names = [p.name for p in Plan.parse("ep=4,form=gather,sums=way,payload=fp8").passes(0)]
    assert names == ["expert-parallel-sums", "quantize-dispatch"]
    *_, last = Plan.parse("ep=4,overlap=auto,step=512").passes(3)
    assert last == Overlap("auto", tokens=512, rank=3)
    assert Plan.parse("ep=4,overlap=3").passes(1)[-1] == Overlap(chunks=3)
    first, *_, last = Plan.parse("ep=4,overlap=3,reschedule=ranks").passes(1)
    assert (first, last) == (RescheduleTokens(objective="ranks"), Overlap(chunks=3))
    assert [p.name for p in Plan.parse("ep=4,step=512").passes(3)] == ["expert-parallel"]
    *_, last = Plan.parse("ep=4,overlap=3,interleave=auto,step=512").passes(1)
    assert last == InterleaveLayers(tokens=512)
    assert Plan.parse("ep=4,interleave=always").passes(1)[-1] == InterleaveLayers(always=True)
    asked = {text: Plan.parse(text).plans_overlap for text in ("ep=4,overlap=2", "ep=4,interleave=always")}
    assert not any(asked.values()) and Plan.parse("ep=4,interleave=auto").plans_overlap


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("eq=4", "'eq=4' is no setting; did you mean 'ep'"),
        ("4", "'4' is no setting"),
        ("ep=four", "ep must be a number from 1 up, not 'four'"),
        ("ep=0", "ep must be a number from 1 up"),
        ("ep=4,form=hierachical", "form cannot be 'hierachical'; did you mean 'hierarchical'"),
        ("ep=4,overlap=three", "overlap cannot be 'three'"),
        ("ep=4,reschedule=true", "reschedule cannot be 'true'"),
        ("ep=4,interleave=true", "interleave cannot be 'true'"),
        ("ep=4,form=hierarchical", "needs several nodes with several ranks each"),
        ("ep=4,nodes=3", "4 ranks are not spread evenly over 3 nodes"),
        ("ep=4,sums=way", "the form 'flat' has no ranks on the way"),
        ("tp=2,ep=3", "of tp=2 and ep=3 one must be a multiple of the other"),
        ("tp=2,ep=4,tokens=equal", "ranks that split heads share out their tokens"),
        ("ep=4,payload=int4", "payload cannot be 'int4'"),
        ("ep=2,etp=2", "moec does not carry out etp, which splits each expert over ranks"),
    ],
)
def test_what_is_no_plan(text: str, says: str) -> None:
    with pytest.raises(ParallelError, match=says.replace("(", r"\(")):
        Plan.parse(text)


def test_one_rank_leaves_the_model_as_it_is() -> None:
    model = Layers(Block())
    kind, before = type(model.layers[0]), dict(model.named_parameters())
    assert moec.parallelize(model) is model
    assert type(model.layers[0]) is kind and layout_of(model) is None
    assert all(p is before[n] for n, p in model.named_parameters())


def test_several_ranks_need_torch_distributed() -> None:
    with pytest.raises(ParallelError, match="ep=4 needs as many ranks, there is one") as error:
        moec.parallelize(Layers(Block()), None, "ep=4")
    assert "torchrun" in str(error.value)
    with pytest.raises(ParallelError, match="tp=2 needs as many ranks, there is one"):
        moec.parallelize(Layers(Block()), None, "tp=2")


def test_which_parameters_are_experts() -> None:
    assert expert_parameters(Layers(Block())) == {"layers.0.gate_up": 4, "layers.0.down": 4}
    found = expert_parameters(build("gpt_oss", layers=1))
    assert {n.rpartition(".")[2] for n in found} == {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}
    assert expert_parameters(nn.Linear(3, 3)) == {}
    assert expert_parameters(Layers(Block()), ("*.down",)) == {"layers.0.down": 4}
    with pytest.raises(ParallelError, match=r"no parameter is called '\*.up'"):
        expert_parameters(Layers(Block()), ("*.up",))


class Listed(nn.Module):
    """Experts as modules; ``same`` says whether they are of one width."""

    def __init__(self, same: bool = True, name: str = "experts") -> None:
        super().__init__()
        setattr(self, name, nn.ModuleList(nn.Linear(4, 8 if same else 8 + i) for i in range(3)))


def test_a_list_of_experts_is_told_of() -> None:
    model = nn.Sequential(Block(), Listed())
    with pytest.raises(ParallelError, match=r"1\.experts is a list of 3 experts, each a module of its own") as error:
        expert_parameters(model)
    assert "one parameter [3, out, in]" in str(error.value)
    assert expert_parameters(model, ("0.down",)) == {"0.down": 4}  # named by hand, the list stays on every rank
    for other in (Listed(same=False), Listed(name="shared_experts"), Listed(name="layers")):
        assert expert_parameters(nn.Sequential(Block(), other)).keys() == {"0.gate_up", "0.down"}


def test_experts_are_dealt_out_as_torch_chunks() -> None:
    for total in range(1, 12):
        for parts in range(1, 8):
            sizes = chunk_sizes(total, parts)
            chunks = [len(c) for c in torch.arange(total).chunk(parts)]
            assert list(sizes) == chunks + [0] * (parts - len(chunks))
    assert owners(torch.tensor([-1, 0, 1, 2, 4, 5]), (2, 2, 1, 0)).tolist() == [4, 0, 0, 1, 2, 4]


def test_foldings_are_legal_and_all_of_them() -> None:
    found = foldings(FACTS, 4, tokens=16)
    keys = {(f.dp, f.tp, f.edp, f.ep, f.etp) for f in found}
    want = {
        (4 // tp, tp, 4 // (ep * etp), ep, etp)
        for tp in (1, 2, 4)
        for ep, etp in [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
    }
    assert keys == want and len(found) == len(want)
    assert [f.forward_sent for f in found] == sorted(f.forward_sent for f in found)
    assert all(f.runs == (f.etp == 1 and FACTS.kv_heads % f.tp == 0) for f in found)
    assert all(Plan.parse(f.plan).tp == f.tp and Plan.parse(f.plan).ep == f.ep for f in found if f.runs)


def test_plans_of_foldings_say_their_nodes() -> None:
    by = {(f.tp, f.ep, f.etp): f for f in foldings(FACTS, 16, nodes=4)}
    assert (by[1, 8, 1].nodes, by[1, 4, 1].nodes, by[1, 2, 1].nodes) == (2, 1, 1)
    plan = Plan.parse(replace(by[1, 8, 1], form="hierarchical").plan)
    assert plan == Plan(ep=8, nodes=2, form="hierarchical")


def test_foldings_that_are_not_carried_out_say_why() -> None:
    reasons = {f.reason for f in foldings(FACTS, 4)}
    assert reasons == {"", "not carried out: etp", "not carried out: key-value heads shared by ranks"}


def test_what_of_attention_is_split() -> None:
    mixtral = split_heads(build("mixtral", layers=1), 2)
    assert mixtral.modules == ("model.layers.0.self_attn",) and mixtral.outputs == ("model.layers.0.self_attn.o_proj",)
    names = {n.removeprefix("model.layers.0.self_attn."): dim for n, dim in mixtral.dims.items()}
    assert names == {"q_proj.weight": 0, "k_proj.weight": 0, "v_proj.weight": 0, "o_proj.weight": 1}
    assert not mixtral.inside
    sinks = split_heads(build("gpt_oss", layers=1), 2)
    assert sinks.dims["model.layers.0.self_attn.sinks"] == 0
    assert "model.layers.0.self_attn.o_proj.bias" not in sinks.dims.keys() | sinks.inside  # added after the sum
    latent = split_heads(build("deepseek_v3", layers=1), 2)
    assert {n.split(".")[-2] for n in latent.dims} >= {"q_b_proj", "kv_b_proj", "o_proj"}
    assert {n.split(".")[-2] for n in latent.inside} >= {"kv_a_proj_with_mqa", "kv_a_layernorm"}


def _bent(**parts: nn.Module) -> Decoder:
    model = Decoder(layers=1)
    for name, part in parts.items():
        setattr(model.layers[0]["self_attn"], name, part)  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    ("model", "tp", "says"),
    [
        (lambda: Decoder(6, 6), 4, "tp=4 does not divide the 6 heads"),
        (lambda: Decoder(4, 2), 4, "tp=4 does not divide the 2 key-value heads"),
        (lambda: Layers(Block()), 2, "config does not say num_attention_heads"),
        (lambda: _bent(qkv=nn.Linear(16, 48)), 2, "not known how to split layers.0.self_attn.qkv"),
        (lambda: _bent(o_proj=nn.Identity()), 2, "the projections of layers.0.self_attn cannot be found"),
        (lambda: _bent(q_norm=nn.RMSNorm(16)), 2, "layers.0.self_attn.q_norm sees all heads at once"),
    ],
)
def test_attention_that_cannot_be_split(model: Callable[[], nn.Module], tp: int, says: str) -> None:
    with pytest.raises(ParallelError, match=says):
        split_heads(model(), tp)


def test_bytes_of_foldings() -> None:
    by = {(f.tp, f.ep, f.etp): f for f in foldings(FACTS, 4, tokens=16)}
    assert by[1, 4, 1].memory == 50_000 + 100_000 + 200_000
    assert by[2, 2, 2].memory == 50_000 + 50_000 + 200_000
    assert by[1, 1, 1].forward_sent == 0
    row = 64 * 4
    assert by[1, 4, 1].expert_sent == 2 * 2 * (16 * 2 * 3 / 4) * row  # layers, there and back
    assert by[1, 4, 1].gradient_sent == 2 * 3 / 4 * 150_000
    assert by[4, 4, 1].attention_sent == 2 * 2 * 3 * 16 * row


def test_uneven_experts_and_odd_ranks() -> None:
    found = foldings(replace(FACTS, experts=5, heads=3, kv_heads=3, inner=6), 3)
    assert {(f.tp, f.ep, f.etp) for f in found} == {(tp, *e) for tp in (1, 3) for e in [(1, 1), (1, 3), (3, 1)]}
    most = next(f for f in found if f.ep == 3 and f.tp == 1)
    assert most.memory == 150_000 + 320_000  # two of five experts
    # four ranks of two experts each would leave one of the four without any: 5 = 2 + 2 + 1 + 0
    assert not any(f.ep == 4 for f in foldings(replace(FACTS, experts=5), 4))
    with pytest.raises(ParallelError, match="4 ranks are not spread evenly over 3 nodes"):
        foldings(FACTS, 4, nodes=3)


def test_expected_bytes_are_the_mean_of_exact_ones() -> None:
    """Every pair of different experts once: as uniform as routing can be."""
    experts, ranks, row = 8, 4, 64
    pairs = torch.cartesian_prod(torch.arange(experts), torch.arange(experts))
    ids = [pairs] * ranks
    counts = 8 * (experts - experts // ranks)
    for r in range(ranks):
        flat = layer_bytes(ids, (2,) * ranks, row)[r][""] - counts
        assert flat == expected_bytes(len(pairs), 2, ranks, row)
        both = layer_bytes(ids, (2,) * ranks, row, "hierarchical", nodes=2)[r]
        overhead = 8 + 4 * 2 * (both_copies := len(pairs) * 3 // 4) + 8 * 2
        assert both.total() - overhead == expected_bytes(len(pairs), 2, ranks, row, "hierarchical", 2), both_copies


def test_facts_of_a_model() -> None:
    model = build("mixtral")
    facts = ModelFacts.of(model)
    assert (facts.experts, facts.top_k, facts.layers, facts.hidden, facts.inner) == (8, 2, 2, 64, 48)
    assert (facts.heads, facts.kv_heads, facts.attention_layers, facts.element) == (4, 2, 2, 4)
    total = sum(p.numel() * 4 for p in model.parameters())
    assert facts.expert_bytes + facts.attention_bytes + facts.other_bytes == total
    assert facts.expert_bytes == 2 * 8 * 3 * 48 * 64 * 4
    with pytest.raises(ParallelError, match="no stacked experts"):
        ModelFacts.of(nn.Linear(3, 3))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from pathlib import Path

    from moec.cli.app import main

    config = str(Path(__file__).resolve().parents[2] / "examples" / "mixtral_small.json")
    with pytest.raises(SystemExit) as stop:
        main(["plan", config, "--ranks", "4", "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert {"dp", "tp", "ep", "etp", "edp", "memory", "form", "runs"} <= found[0].keys()
    with pytest.raises(SystemExit):
        main(["plan", config, "--ranks", "4", "--nodes", "2", "--show", "3"])
    assert "dp 4 x tp 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["plan", config, "--ranks", "4", "--nodes", "3"])
    assert stop.value.code == 2
    assert "not spread evenly" in capsys.readouterr().err
