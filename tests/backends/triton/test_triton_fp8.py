"""GEMMs in fp8 with a scale for every block, in Triton's interpreter, against a loop on what the numbers stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from moec.backends.base import program_op
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launcher import Launcher
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.run import Run
from moec.backends.triton.spec import read_spec
from tests.backends.cases import ExpertsCase, relative_error
from tests.backends.triton.layers import dirty_memory

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore:All-NaN slice"),  # dead rows, which nobody reads
]
CASE = ExpertsCase(dtype="bf16", weight_dtype="f32", hidden=136, inner=144, experts=3, top_k=2, sentinels=True)
"""Neither width is a multiple of 128, and up begins within a block of gate's."""
TOLERANCE = 8e-3
"""One unit in the last place of bf16: sums are taken in another order."""
LAUNCHES = {
    "gemm": Launch("gemm", Tile(16, 64, 64), Tile(16, 64, 128)),
    "descriptors": Launch("gemm", Tile(16, 64, 128, tma=True), Tile(16, 64, 64, tma=True)),
    "split": Launch("gemm", Tile(16, 64, 128), Tile(16, 64, 128, split_k=2)),
    "gemv": Launch("gemv", Tile(1, 64, 128), Tile(1, 64, 64)),
}


def _weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """[E, N, K] in fp8 and the scales of its 128 x 128 blocks."""
    _, n, k = w.shape
    blocks = pad(w, (0, -k % 128, 0, -n % 128)).unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    scales = blocks.abs().amax((2, 4)) / 448
    values = (blocks / scales[:, :, None, :, None]).flatten(3).flatten(1, 2)[:, :n, :k]
    return values.to(torch.float8_e4m3fn).contiguous(), scales


def _weight_value(values: Tensor, scales: Tensor) -> Tensor:
    _, n, k = values.shape
    return values.float() * scales.repeat_interleave(128, 1)[:, :n].repeat_interleave(128, 2)[:, :, :k]


def _row_value(x: Tensor) -> Tensor:
    """A row as fp8 holds it."""
    blocks = pad(x.float(), (0, -len(x) % 128)).view(-1, 128)
    scales = blocks.abs().amax(1, keepdim=True) / 448
    return ((blocks / scales).to(torch.float8_e4m3fn).float() * scales).flatten()[: len(x)]


def _run(launch: Launch, tokens: int, change: Callable[[str], str] = lambda text: text) -> tuple[Tensor, Tensor]:
    """What the kernels give, and what is right."""
    x, ids, weights, up, down = CASE.inputs(tokens)
    (up, up_scales), (down, down_scales) = _weight(up.float()), _weight(down.float())
    spec = replace(read_spec(program_op(CASE.graph())), fp8=True)
    file = write_experts(spec, True)
    rows = {"x": x, "x_s": x.stride(0), "ids": ids, "weights": weights, "slots_n": ids.numel()}

    def weight(w: Tensor, scales: Tensor) -> dict[str, object]:
        return {"w": w, "w_se": w.stride(0), "w_s": w.stride(1), "w_scale": scales}

    with dirty_memory():
        run = Run(spec, launch, Launcher(replace(file, text=change(file.text))), tokens)
        got = run.layer(rows | weight(up, up_scales), rows | weight(down, down_scales), {}, {})
    up_value, down_value = _weight_value(up, up_scales), _weight_value(down, down_scales)
    want = torch.zeros(tokens, CASE.hidden)
    for t, chosen in enumerate(ids.tolist()):
        for j, e in enumerate(chosen):
            if 0 <= e < CASE.experts:
                gate, value = (up_value[e] @ _row_value(x[t])).bfloat16().chunk(2)
                want[t] += weights[t, j] * (down_value[e] @ _row_value(silu(gate) * value)).bfloat16()
    return got, want.bfloat16()


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_layers_in_fp8(launch: str, tokens: int) -> None:
    got, want = _run(LAUNCHES[launch], tokens)
    assert relative_error(got, want) <= TOLERANCE


MUTANTS = {
    "scale of a row": ("row_scale + k // 128", "row_scale"),
    "scale of outputs": ("u_n // 128", "g_n // 128"),
    "scale of inputs": ("* 2 + k // 128", "* 2"),
    "scale of an expert": ("w_scale + expert.to(tl.int64)", "w_scale + 0 * expert.to(tl.int64)"),
    "largest of a row": ("tl.max(tl.abs(x), 1)", "tl.max(x, 1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_scale_shows(name: str) -> None:
    old, new = MUTANTS[name]

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    got, want = _run(LAUNCHES["gemm"], 9, change)
    assert not relative_error(got, want) <= TOLERANCE


def test_every_number_of_fp8_is_rounded_to_as_torch_does() -> None:
    """The interpreter's own rounding loses carries; what is written for it is compared here, subnormals included."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(700) * 2.0**e for e in (-12, -7, 0, 6)]).clamp(-448, 448)
    x = torch.cat([x, torch.arange(-448, 448) / 512]).bfloat16()[:, None].repeat(1, 128)
    x[:, -1] = 448.0  # the scale is 1
    spec = replace(read_spec(program_op(CASE.graph())), fp8=True, hidden=128)
    values, scales = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(len(x), 1)
    given = {"source": x, "source_s": 128, "rows_n": len(x), "values": values, "scales": scales}
    Launcher(write_experts(spec, True))("quantize_x", len(x), given, {"BLOCK_M": 0})
    assert torch.equal(scales, torch.ones(len(x), 1))
    assert torch.equal(values.float(), x.to(torch.float8_e4m3fn).float())
