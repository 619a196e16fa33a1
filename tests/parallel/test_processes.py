"""Four processes over gloo: bits of one process, whole models, checkpoints, memory, and ranks that fail."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from moec.backends.registry import get_backend
from moec.parallel.formula import layer_bytes, tensor_parallel_bytes
from tests.compile.blocks import HIDDEN, Layers, tokens
from tests.parallel.heads import LAYERS, SEQUENCES, TP, Decoder, sequence
from tests.parallel.layers import one_process
from tests.parallel.ranks import (
    ATEN_CASES,
    CASES,
    CPU_CASES,
    CPU_TARGET,
    LIMIT,
    RANKS,
    TOKENS,
    Casting,
    main,
    model,
    part,
)
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow  # four processes start, and generated kernels are built

SAME = 1e-5  # fp32, sums in another order; relative to max(1, largest element)
BF16 = 2e-2  # a gradient row is rounded once more than in one process
SLACK = 3 << 20  # bytes: pages of code that is run for the first time
DEADLINE = 240.0  # seconds for all cases of all ranks, on a busy machine


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found, case by case. No process outlives this."""
    return run_processes(main, RANKS, tmp_path_factory.mktemp("ranks"), DEADLINE, lost=(RANKS - 1,))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process without any compiler, on the tokens of all ranks."""
    m, x = model(), torch.cat([part(i) for i in range(RANKS)])
    out = m(x)
    out.square().sum().backward()
    more = [m(torch.cat([part(i, seed) for i in range(RANKS)])).detach() for seed in (2, 3)]
    grads = {n: p.grad for n, p in m.named_parameters()}
    norm = torch.nn.utils.get_total_norm([g for g in grads.values() if g is not None])
    return {"out": out.detach(), "grads": grads, "more": more, "norm": norm}


def found(ranks: list[dict[str, Any]], case: str, count: int = RANKS) -> list[Any]:
    for results in ranks[:count]:
        assert not isinstance(results[case], str), results[case]  # a traceback
    return [results[case] for results in ranks[:count]]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = SAME) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max().clamp(min=1)


def rows(whole: torch.Tensor, rank: int) -> torch.Tensor:
    start = sum(TOKENS[:rank])
    return whole[start : start + TOKENS[rank]]


@pytest.mark.parametrize("at", range(len(ATEN_CASES)), ids=[f"{form}-{h}" for _, form, h in ATEN_CASES])
def test_layers_on_aten(ranks: list[dict[str, Any]], at: int) -> None:
    layer, form, histogram = ATEN_CASES[at]
    mine, given = [each[at] for each in found(ranks, "aten")], layer.tokens(histogram)
    out, grads = one_process(layer, get_backend("aten"), given, layer.gradients(given))
    assert torch.equal(torch.cat([m["out"] for m in mine]), out)
    for i, want in enumerate(grads):
        got = torch.cat([m["grads"][i] for m in mine])
        if form == "flat":
            assert torch.equal(got, want), f"gradient {i}"
        else:
            close(got, want)
    sent = layer_bytes([t[1] for t in given], layer.sizes, layer.hidden * 4, form, nodes=layer.nodes)
    for rank, each in enumerate(mine):
        counted: Counter[str] = Counter()
        for (_, group), count in each["sent"].items():
            counted[group.removeprefix("ep")] += count
        assert +counted == +sent[rank], f"rank {rank}"


@pytest.mark.parametrize("at", range(len(CPU_CASES)), ids=[f"{c.dtype}-{h}" for c, h in CPU_CASES])
def test_layers_on_generated_kernels(ranks: list[dict[str, Any]], at: int) -> None:
    if not found(ranks, "cpu")[0]:
        pytest.skip("there is no C++ compiler")
    layer, histogram = CPU_CASES[at]
    mine, given = [each[at] for each in found(ranks, "cpu")], layer.tokens(histogram)
    out, grads = one_process(layer, get_backend("cpu"), given, layer.gradients(given), CPU_TARGET)
    assert torch.equal(torch.cat([m["out"] for m in mine]), out)
    for i, want in enumerate(grads):
        got = torch.cat([m["grads"][i] for m in mine])
        if layer.dtype == "f32":
            assert torch.equal(got, want), f"gradient {i}"
        else:
            close(got, want, BF16)


def test_a_training_step_through_the_compile_door(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank, result in enumerate(found(ranks, "door")):
        assert result["fused"] == [True, True]
        close(result["out"], rows(alone["out"], rank))
        close(result["norm"], alone["norm"])
        for name, want in alone["grads"].items():
            close(result["grads"][name], want)
        for got, want in zip(result["more"], alone["more"], strict=True):
            close(got, rows(want, rank))
        assert result["numbers"] == sum(p.numel() for n, p in model().named_parameters() if "router" not in n) // RANKS


def test_histograms_do_not_recompile(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found(ranks, "door")):
        # without gradients once for the first number of tokens, once for any, and for 0 and 1 token
        assert result["graphs"] <= 3, f"rank {rank}"


def test_replicas_of_experts(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank, result in enumerate(found(ranks, "replicas")):
        close(result["out"], rows(alone["out"], rank))
        for name, want in alone["grads"].items():
            close(result["grads"][name], want / RANKS)


def test_eager_gathers_and_is_right(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank, result in enumerate(found(ranks, "eager")):
        close(result["out"], rows(alone["out"], rank))
        for name, want in alone["grads"].items():
            close(result["grads"][name], want)


def test_casts_are_of_shares(ranks: list[dict[str, Any]]) -> None:
    m, x = Layers(Casting()), torch.cat([part(i) for i in range(RANKS)])
    want = m(x)
    want.square().sum().backward()
    for rank, result in enumerate(found(ranks, "cast")):
        assert result["kinds"] == {"all_to_all"}
        close(result["out"], rows(want.detach(), rank), BF16)
        for name, p in m.named_parameters():
            assert p.grad is not None
            close(result["grads"][name], p.grad, 2 * BF16)


def test_saved_on_four_ranks_loaded_on_two(ranks: list[dict[str, Any]]) -> None:
    results = found(ranks, "checkpoint")
    saved = results[0]["saved"]
    assert any(not torch.equal(saved[n], p) for n, p in model().named_parameters()), "the step changed nothing"
    for result in results[:2]:
        assert result["loaded"].keys() == saved.keys()
        assert all(torch.equal(result["loaded"][n], saved[n]) for n in saved)
    m = model()
    m.load_state_dict(saved)
    close(results[1]["out"], m(tokens(5)).detach())


def test_inductor_around_experts(ranks: list[dict[str, Any]]) -> None:
    m, x = model(), torch.cat([part(0), part(1)])
    out = m(x)
    out.square().sum().div(2).backward()
    for rank, result in enumerate(found(ranks, "inductor", 2)):
        close(result["out"], rows(out.detach(), rank))
        for name, p in m.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0
            close(result["grads"][name], p.grad)


def test_ranks_agree_on_names_after_a_mesh_of_some(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    results = found(ranks, "named")
    assert len({result["group"] for result in results}) == 1
    for rank, result in enumerate(results):
        close(result["out"], rows(alone["out"], rank))


def _decoded(m: Decoder, groups: int, mean: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """One process: results of every group's tokens, and gradients."""
    outs = [m(sequence(g)) for g in range(groups)]
    torch.stack([out.square().sum() for out in outs]).sum().div(groups if mean else 1).backward()
    return [o.detach() for o in outs], {n: p.grad for n, p in m.named_parameters() if p.grad is not None}


def test_ranks_that_split_heads_train_as_one_process(ranks: list[dict[str, Any]]) -> None:
    m = Decoder()
    outs, grads = _decoded(m, RANKS // TP, mean=True)
    norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    results = found(ranks, "trained")
    for rank, result in enumerate(results):
        assert result["fused"] == [True, True]
        close(result["out"], outs[rank // TP])
        close(result["norm"], norm)
        assert result["grads"].keys() == dict(m.named_parameters()).keys()
    # clipping has scaled the gradients of one process, in place
    factor = min(1.0, 1.0 / (norm.item() + 1e-6))
    for result in results:
        for name, want in grads.items():
            assert want.abs().max() > 0, f"{name} has no gradient: the test is blind"
            close(result["grads"][name] * factor, want)
    torch.optim.SGD(m.parameters(), lr=0.1).step()
    for rank, result in enumerate(results):
        close(result["more"], m(sequence(rank // TP, 2)).detach())
        for name, p in m.named_parameters():
            close(result["saved"][name], p.detach())
    for result in results[:2]:
        assert all(torch.equal(result["loaded"][n], saved) for n, saved in results[0]["saved"].items())


def test_ranks_that_split_heads_hold_their_share(ranks: list[dict[str, Any]]) -> None:
    for result in found(ranks, "trained"):
        for name, share in result["shares"].items():
            own = name.rpartition(".")[0].rpartition(".")[2]
            if own == "mlp" and "router" not in name:
                assert share == 1 / RANKS, name
            elif own in ("q_proj", "k_proj", "v_proj") or name.endswith("o_proj.weight"):
                assert share == 1 / TP, name
            else:
                assert share == 1, name


def test_bytes_of_split_heads(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found(ranks, "trained")):
        due = tensor_parallel_bytes(SEQUENCES[rank // TP], TP, rank % TP, HIDDEN * 4)
        reduced, gathered = due["reduce_scatter"], due["attention"] + due["experts"]
        # Block chooses inside, so no weights of choices come in; every sum of the forward has its pair
        for sent, times in ((result["sent"], LAYERS), (result["both"], 2 * LAYERS)):
            of_tp = {kind: count for (kind, group), count in sent.items() if group.startswith("tp")}
            assert of_tp == {"reduce_scatter": times * reduced, "all_gather": times * gathered}, f"rank {rank}"


def test_more_ranks_to_heads_than_to_experts(ranks: list[dict[str, Any]]) -> None:
    outs, grads = _decoded(Decoder(4, 4), 1, mean=False)
    for result in found(ranks, "folded"):
        close(result["out"], outs[0])
        for name, want in grads.items():
            close(result["grads"][name], want)


def test_memory_is_the_shared_part_and_a_share(ranks: list[dict[str, Any]]) -> None:
    experts, shared = 8 * (1024 * 256 + 256 * 1024) * 4, 512 * 512 * 4
    for rank, result in enumerate(found(ranks, "memory")):
        due = shared + experts // RANKS
        assert result["held"] == due
        assert result["most"] <= 1.05 * due + SLACK, f"rank {rank}: {result['most'] / due:.3f} of what is due"
        assert result["down"].shape == (2, 256, 1024)
    assert not torch.equal(ranks[0]["memory"]["down"], ranks[1]["memory"]["down"])


@pytest.mark.parametrize(
    ("case", "kind", "texts"),
    [
        ("plan", "ParallelError", ["differ in their mesh and plan: plan is", "ep=2", "on rank 3", "on the others"]),
        ("weights", "ParallelError", ["differ in their replicated weights: layers.1.router is", "on rank 2"]),
        ("divide", "ParallelError", ["ep=3 does not divide the mesh's 4 ranks", "[1, 2, 4]"]),
        ("heads", "ParallelError", ["tp=4 does not divide the 6 heads of attention", "choose tp among [1, 2, 3, 6]"]),
        ("size", "CommError", ["over group 'ep': the graph was made for 2 ranks, the group has 4"]),
        ("unbound", "CommError", ["no process group is bound to 'epp'; did you mean 'ep'"]),
    ],
)
def test_ranks_that_disagree(ranks: list[dict[str, Any]], case: str, kind: str, texts: list[str]) -> None:
    for result in found(ranks, "disagreements"):
        assert result[case]["kind"] == kind, result[case]["text"]
        for text in texts:
            assert text in result[case]["text"]


def test_a_rank_that_does_not_come_to_the_start(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found(ranks, "disagreements")):
        if rank != 1:
            assert (
                "rank 1 has not come to compare its mesh and plan with the ranks [0, 1, 2, 3] within 1.5 s"
                in result["absent"]["text"]
            )
            assert result["absent"]["seconds"] < LIMIT + 2


def test_a_rank_that_hangs_is_named(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found(ranks, "hang", RANKS - 1)):
        assert result["kind"] == "RankError", result["text"]
        assert f"all_to_all number 2 over group 'slow' did not complete on rank {rank}" in result["text"]
        assert "rank 3 hangs: it is alive, and its last collective was all_to_all number 1" in result["text"]
        assert result["seconds"] < LIMIT + 5


def test_a_rank_that_is_killed_is_named(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found(ranks, "killed", RANKS - 1)):
        assert result["kind"] == "RankError", result["text"]
        assert f"all_to_all number 2 over group 'short' did not complete on rank {rank}" in result["text"]
        assert "rank 3 is dead or stopped (no sign of life for 1 s)" in result["text"]
        assert result["seconds"] < LIMIT + 5


def test_all_cases_ran(ranks: list[dict[str, Any]]) -> None:
    for result in ranks[: RANKS - 1]:
        print({k: round(v, 1) for k, v in result.items() if k.endswith("took")})
        assert {case.__name__ for case in CASES} <= result.keys()


BEATING = """
import torch.distributed as dist
from moec.backends.distributed import faults
faults.BEAT = 0.0
dist.init_process_group("gloo", store=dist.FileStore(r"{store}", 1), rank=0, world_size=1)
faults.start_heart()
dist.destroy_process_group()
"""


def test_a_process_ends_while_its_heart_beats(tmp_path: Path) -> None:
    code = BEATING.format(store=tmp_path / "store")
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
