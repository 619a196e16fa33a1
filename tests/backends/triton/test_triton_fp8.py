"""GEMMs in fp8 with a scale for every block, in Triton's interpreter, against a loop on what the numbers stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.reference import AutogradKernel, run_graph
from moec.backends.registry import get_backend
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launcher import Launcher
from moec.backends.triton.launches.tiles import Launch, Tile, may_halve
from moec.backends.triton.spec import read_spec
from tests.backends.cases import ExpertsCase, case_id, relative_error
from tests.backends.test_fp8_meaning import CASE, TOLERANCE, loop
from tests.backends.triton.layers import replaced, run

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # dead rows, which nobody reads
]
LAUNCHES = {
    "gemm": Launch("gemm", Tile(16, 64, 64), Tile(16, 64, 128)),
    "descriptors": Launch("gemm", Tile(16, 64, 128, tma=True), Tile(16, 64, 64, tma=True)),
    "split": Launch("gemm", Tile(16, 64, 128), Tile(16, 64, 128, split_k=2)),
    "gemv": Launch("gemv", Tile(1, 64, 128), Tile(1, 64, 64)),
}


def _run(launch: Launch, tokens: int, change: Callable[[str], str] = lambda text: text) -> tuple[Tensor, Tensor]:
    """What the kernels give, and what is right."""
    inputs = CASE.inputs(tokens)
    return run(CASE, launch, inputs, change), loop(CASE, inputs)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_layers_in_fp8(launch: str, tokens: int) -> None:
    got, want = _run(LAUNCHES[launch], tokens)
    assert relative_error(got, want) <= TOLERANCE


FLIPPED = 3e-2
"""A row that differs in its last bit between the GEMMs may become another number of fp8, an eighth away."""
EVEN = replace(CASE, hidden=256, bias=True)
"""The result has two halves that are blocks of scales."""
_TALL = Tile(16, 64, 128, units=3, tma=True, ahead=5)
HALVES = {
    "halves": Launch("gemm", Tile(16, 64, 128), Tile(16, 32, 64, halves=True)),
    "persistent": Launch("gemm", Tile(16, 64, 128), Tile(16, 128, 128, halves=True), programs=3),
    "descriptors": Launch("gemm", _TALL, replace(_TALL, halves=True)),
}


def _apart(launch: Launch, tokens: int, change: Callable[[str], str] = lambda text: text) -> float:
    """How far tiles of both halves are from the definition."""
    inputs = EVEN.inputs(tokens)
    (want,) = run_graph(EVEN.graph(), inputs)
    return relative_error(run(EVEN, launch, inputs, change), want)


@pytest.mark.parametrize("launch", HALVES)
@pytest.mark.parametrize("tokens", [0, 1, 9, 40])
def test_tiles_with_columns_of_both_halves(launch: str, tokens: int) -> None:
    assert _apart(HALVES[launch], tokens) <= FLIPPED


HALVES_MUTANTS = {
    "where the right half is stored": ("BLOCK_N + 128)[:, None]", "BLOCK_N)[:, None]"),
    "outputs of the right half": ("right_n = column_in + 128", "right_n = column_in"),
    "scale of the right half": ("* (r_scale * right_scale)", "* (r_scale * left_scale)"),
    "rows of the right half": ("* (r_scale * right_scale)", "* right_scale"),
    "columns of a half": ("(128 + BLOCK_N - 1) // BLOCK_N", "(96 + BLOCK_N - 1) // BLOCK_N"),
}


@pytest.mark.parametrize("name", HALVES_MUTANTS)
def test_a_wrong_half_shows(name: str) -> None:
    assert not _apart(HALVES["halves"], 40, replaced(*HALVES_MUTANTS[name])) <= FLIPPED


def test_halves_are_of_fp8_and_whole_blocks_of_scales() -> None:
    """Other layers have no such kernel, and no launch asks for one that shares sums or adds to the result."""
    made = {c.hidden: "down_halves" in write_experts(read_spec(program_op(c.graph()))).kernels for c in (CASE, EVEN)}
    assert made == {136: False, 256: True}
    assert not may_halve("bf16", 256)
    both = replace(_TALL, halves=True)
    for launch in (Launch("gemm", _TALL, _TALL, atomic=True), Launch("gemm", _TALL, _TALL)):
        down = both if launch.atomic else replace(both, split_k=2)
        with pytest.raises(ValueError, match="both halves"):
            replace(launch, down=down)


KINDS = [
    ExpertsCase("interleaved", bias=True, dtype="f16", hidden=40, inner=136, experts=4, top_k=3, fp8=True),
    ExpertsCase("separate", dtype="bf16", captures=True, post=True, hidden=136, inner=24, experts=3, fp8=True),
    ExpertsCase("single", dtype="f32", hidden=136, inner=136, experts=2, top_k=2, fp8=True),
    ExpertsCase("rows", dtype="bf16", hidden=24, inner=136, experts=3, bias=True, fp8=True),
]


@pytest.mark.parametrize("case", KINDS, ids=case_id)
def test_every_kind_of_layer_in_fp8(case: ExpertsCase) -> None:
    """Against the definition; gradients are those of the definition itself."""
    for launch, tokens, skew in (("gemm", 9, "half_empty"), ("gemv", 2, "one_expert")):
        inputs = case.inputs(tokens, skew)
        (want,) = run_graph(case.graph(), inputs)
        got = run(case, LAUNCHES[launch], inputs)
        assert got.dtype == want.dtype
        assert relative_error(got, want) <= FLIPPED, (launch, tokens)
    kernel = get_backend("triton").load(get_backend("triton").lower(case.graph(), "cpu"))
    needs = [i in (0, 2) for i in range(len(inputs))]
    grad = torch.ones(tokens, case.hidden).to(inputs[0].dtype)
    want_dx = AutogradKernel(lambda i: run_graph(case.graph(), i)).backward([grad], inputs, needs)[0]
    assert torch.equal(kernel.backward([grad], inputs, needs)[0], want_dx)  # type: ignore[arg-type]


MUTANTS = {
    "scale of a row": ("row_scale + k // 128", "row_scale"),
    "scale of outputs": ("u_n // 128", "g_n // 128"),
    "scale of inputs": (" + k // 128, u_n", ", u_n"),
    "scale of all outputs": ("+ 0) // 128", "+ 128) // 128"),
    "rows that there are": ("rows_n = tl.load(used) * BLOCK_M", "rows_n = tl.load(used)"),
    "scale of an expert": ("w_scale + expert.to(tl.int64)", "w_scale + 0 * expert.to(tl.int64)"),
    "largest of a row": ("tl.max(tl.abs(x), 1)", "tl.max(x, 1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_scale_shows(name: str) -> None:
    got, want = _run(LAUNCHES["gemm"], 9, replaced(*MUTANTS[name]))
    assert not relative_error(got, want) <= TOLERANCE


def test_every_number_of_fp8_is_rounded_to_as_torch_does() -> None:
    """The interpreter's own rounding loses carries; what is written for it is compared here, subnormals included."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(700) * 2.0**e for e in (-12, -7, 0, 6)]).clamp(-448, 448)
    x = torch.cat([x, torch.arange(-448, 448) / 512]).bfloat16()[:, None].repeat(1, 128)
    x[:, -1] = 448.0  # the scale is 1
    spec = replace(read_spec(program_op(CASE.graph())), hidden=128)
    values, scales = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(len(x), 1)
    given = {"source": x, "source_s": 128, "rows_n": len(x), "values": values, "scales": scales}
    Launcher(write_experts(spec, True))("quantize_x", len(x), given, {"BLOCK_M": 0})
    assert torch.equal(scales, torch.ones(len(x), 1))
    assert torch.equal(values.float(), x.to(torch.float8_e4m3fn).float())
