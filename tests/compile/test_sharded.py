"""Sharded models: two processes with a shard each train as one process does, and no block is wrong or silent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from tests.compile.ranks import CASES, RANKS, TOKENS, main, make, part, train, whole
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow  # two processes start, and generated kernels are built

SAME = 1e-5  # fp32, gradients averaged in another order; relative to max(1, largest element)
BF16 = 2e-2  # sums of bf16 products, in another order
DEADLINE = 240.0  # seconds for all cases of all ranks, on a busy machine
TRAINED = [name for name in CASES if name.startswith(("ddp", "fsdp")) and name != "fsdp_inference"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found, case by case. No process outlives this."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEC_CACHE_DIR", str(folder / "cache"))
        return run_processes(main, RANKS, folder, DEADLINE)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process without any compiler, on the tokens of all ranks."""
    model, x = make(), torch.cat([part(i) for i in range(RANKS)])
    with torch.no_grad():
        first = model(x)
    return {"first": first, "out": train(model, model, x), "parameters": whole(model)}


def found(ranks: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    for results in ranks:
        assert not isinstance(results[case], str), results[case]  # a traceback
    return [results[case] for results in ranks]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = SAME) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("case", TRAINED)
def test_training_equals_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any], case: str) -> None:
    start = whole(make())
    for rank, result in enumerate(found(ranks, case)):
        close(result["out"], alone["out"][rank * TOKENS : (rank + 1) * TOKENS])
        assert result["parameters"].keys() == alone["parameters"].keys()
        for name, want in alone["parameters"].items():
            close(result["parameters"][name], want)
            assert (want - start[name]).abs().max() > 10 * SAME, f"{name} was not trained: the test is blind"


@pytest.mark.parametrize("case", [name for name in TRAINED if name != "ddp_in_buckets"])
def test_blocks_of_replicas_and_of_unsharded_layers_are_fused(ranks: list[dict[str, Any]], case: str) -> None:
    for result in found(ranks, case):
        assert result["fused"] == [True, True]
        assert not result["told"]
        assert result["ran"]["moec::experts"] == result["ran"]["moec::experts_backward"] == 2 * 2  # layers, steps


def test_inference_in_bf16_with_fsdp(ranks: list[dict[str, Any]]) -> None:
    """Parameters are gathered in bf16; compared with the same model without a compiler."""
    for result in found(ranks, "fsdp_inference"):
        assert all(result["fused"])
        assert result["ran"]["moec::experts"] == 2 * 2  # layers, calls
        close(result["out"], result["eager"], BF16)


def test_graphs_cut_for_ddp_say_so_and_how_to_keep_them_whole(ranks: list[dict[str, Any]]) -> None:
    for result in found(ranks, "ddp_in_buckets"):
        assert not any(result["fused"])
        assert "moec::experts" not in result["ran"]
        (told,) = set(result["told"])
        assert "gradient buckets of DistributedDataParallel" in told
        assert "optimize_ddp = False" in told
        assert set(result["reasons"]) == {told}


@pytest.mark.parametrize("case", ["replicated", "sharded_by_expert"])
def test_dtensors_stay_with_pytorch(ranks: list[dict[str, Any]], alone: dict[str, Any], case: str) -> None:
    for result in found(ranks, case):
        close(result["out"], alone["first"])
        assert result["fused"] == [False, False]
        assert "moec::experts" not in result["ran"]
        assert len(result["told"]) == 2
        for i, told in enumerate(result["told"]):
            assert f"'layers.{i}' runs as PyTorch would run it: gate_up is a DTensor" in told
            assert "fully_shard" in told


def test_local_parts_of_dtensors_are_fused(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for result in found(ranks, "local_parts"):
        close(result["out"], alone["first"])
        assert result["fused"] == [True, True]
        assert result["ran"]["moec::experts"] == 2
