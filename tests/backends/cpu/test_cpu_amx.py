"""The kernels for AMX: with its tile instructions in plain C++, and as they are where the processor has them."""

from __future__ import annotations

import ctypes
import mmap
import re
from functools import cache

import pytest
import torch
from torch import Tensor

from moec.backends.base import Kernel
from moec.backends.cpu import CpuBackend, LoadError, isa
from moec.backends.cpu.build import build, compiler
from moec.backends.cpu.isa import EMULATED_AMX, LEVELS, isa_of, missing
from moec.backends.cpu.source import read_shape, write_source
from tests.backends.cases import SKEWS, TOLERANCE, ExpertsCase, case_id, loop_experts, relative_error

BACKEND = CpuBackend()
NATIVE = not missing(LEVELS["amx"])
pytestmark = pytest.mark.skipif(
    compiler() is None or bool(missing(EMULATED_AMX)), reason="no C++ compiler, or no AVX-512 BF16 in this processor"
)
each_level = pytest.mark.parametrize(
    "level",
    [
        EMULATED_AMX.name,
        pytest.param("amx", marks=pytest.mark.skipif(not NATIVE, reason="no AMX in this processor")),
    ],
)
TOKENS = (0, 1, 2, 31, 33, 257)
ODD = [
    ExpertsCase(hidden=45, inner=70, dtype="bf16", weight_dtype="f32", layout="interleaved", bias=True, sentinels=True),
    ExpertsCase(hidden=33, inner=21, dtype="bf16", up_form="kn", down_form="kn", layout="interleaved", bias=True),
    ExpertsCase(hidden=71, inner=100, dtype="bf16", up_form="kn", layout="separate", stacked=False, bias=True),
    ExpertsCase(hidden=130, inner=141, dtype="bf16", down_form="kn", layout="single", captures=True),
    ExpertsCase(hidden=130, inner=141, dtype="bf16", layout="single", captures=True),
    ExpertsCase(hidden=130, inner=141, dtype="bf16", layout="single"),
    ExpertsCase(hidden=67, inner=83, dtype="bf16", layout="separate", stacked=False, bias=True),
    ExpertsCase(hidden=37, inner=45, dtype="bf16", layout="rows", post=True),
]
LONG = ExpertsCase(
    hidden=4300, inner=600, dtype="bf16", weight_dtype="f32", down_form="kn", layout="single", experts=3, top_k=2
)
BITS = ExpertsCase(hidden=150, inner=90, dtype="bf16", weight_dtype="f32", up_form="kn")


@cache
def load(case: ExpertsCase, level: str) -> Kernel:
    return BACKEND.load(BACKEND.lower(case.graph(), f"cpu:{level}"))


@each_level
@pytest.mark.parametrize("case", ODD, ids=case_id)
def test_odd_widths_are_the_loop(case: ExpertsCase, level: str) -> None:
    kernel = load(case, level)
    for tokens in TOKENS:
        for skew in SKEWS:
            inputs = case.inputs(tokens, skew)
            got = kernel.forward(inputs)[0]
            assert relative_error(got, loop_experts(case, inputs)) <= TOLERANCE["bf16"], (tokens, skew)


@each_level
@pytest.mark.parametrize("tokens", [14, 70])
def test_long_rows_are_cut_alike(tokens: int, level: str) -> None:
    inputs = LONG.inputs(tokens)
    got = load(LONG, level).forward(inputs)[0]
    assert relative_error(got, loop_experts(LONG, inputs)) <= TOLERANCE["bf16"]
    again = load(LONG, level).forward([t[:3] for t in inputs[:3]] + inputs[3:])[0]  # one slice, where many had several
    assert torch.equal(again, got[:3])


@each_level
def test_a_token_has_the_same_bits_whatever_its_mates_and_the_threads(level: str) -> None:
    kernel, inputs = load(BITS, level), BITS.inputs(41)
    torch.set_num_threads(1)
    whole = kernel.forward(inputs)[0]
    assert relative_error(whole, loop_experts(BITS, inputs)) <= TOLERANCE["bf16"]
    for cut in (slice(0, 1), slice(7, 9), slice(5, 12), slice(3, 40)):
        few = [t[cut] for t in inputs[:3]] + inputs[3:]
        assert torch.equal(kernel.forward(few)[0], whole[cut]), cut
    many = [torch.cat([t] * 24) for t in inputs[:3]] + inputs[3:]  # experts with more rows than a task takes
    assert torch.equal(kernel.forward(many)[0], torch.cat([whole] * 24))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(kernel.forward(inputs)[0], whole)
        assert torch.equal(kernel.forward(many)[0][: len(whole)], whole)


@pytest.mark.skipif(not NATIVE, reason="no AMX in this processor")
@pytest.mark.parametrize("case", [LONG, BITS], ids=case_id)
def test_the_emulation_has_the_processors_bits(case: ExpertsCase) -> None:
    inputs = case.inputs(40)
    inputs[0][::3] *= 1e-38  # products and sums that are denormal
    assert torch.equal(load(case, EMULATED_AMX.name).forward(inputs)[0], load(case, "amx").forward(inputs)[0])


@each_level
@pytest.mark.parametrize("case", ODD[:2], ids=case_id)
def test_what_lies_beside_the_weights_is_not_read(case: ExpertsCase, level: str) -> None:
    """NaN between and after the rows of every matrix; the last one ends where the process may no longer read."""
    inputs = case.inputs(37)
    want = load(case, level).forward(inputs)[0]

    def fenced(t: Tensor) -> Tensor:
        wide = torch.cat([t, torch.full_like(t, torch.nan)], dim=-1)[..., : t.shape[-1] + 3].contiguous()
        used = wide.numel() - 3  # the last row has nothing after it
        pages = -(-used * 2 // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        keep.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        flat = torch.frombuffer(memory, dtype=t.dtype, count=used, offset=pages * mmap.PAGESIZE - used * 2)
        flat.copy_(wide.flatten()[:used])
        return flat.as_strided(t.shape, wide.stride())

    keep: list[mmap.mmap] = []
    moved = [fenced(t) if t.dim() == 3 else t for t in inputs]
    assert len(keep) == 2
    assert torch.equal(load(case, level).forward(moved)[0], want)


def test_f16_uses_no_tiles_and_bf16_does() -> None:
    product = re.compile(rb"\xc4\xe2[\x42\x4a\x52\x5a\x62\x6a\x72\x7a]\x5c[\xc0-\xff]", re.DOTALL)  # TDPBF16PS

    def tiles(dtype: str) -> bool:
        source = write_source(read_shape(ExpertsCase(dtype=dtype).graph().ops[0]), up_nk=True, down_nk=False)
        return product.search(build(source, LEVELS["amx"]).read_bytes()) is not None

    assert tiles("bf16")
    assert not tiles("f16")


def test_the_operating_system_has_to_allow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ExpertsCase(dtype="bf16")
    artifact = BACKEND.lower(case.graph(), "cpu:amx")
    monkeypatch.setattr(isa, "cpu_flags", lambda: LEVELS["amx"].needs)
    monkeypatch.setattr(isa, "_ask_for_tiles", lambda: "")
    assert isa_of("cpu") is LEVELS["amx"]
    monkeypatch.setattr(isa, "_ask_for_tiles", lambda: "Operation not supported")
    assert isa_of("cpu") is LEVELS["avx512_bf16"]
    with pytest.raises(LoadError, match="Operation not supported") as caught:
        BACKEND.load(artifact)
    assert "cpu:avx512_bf16" in str(caught.value.hint)
    monkeypatch.setattr(isa, "cpu_flags", lambda: LEVELS["avx512_bf16"].needs)
    with pytest.raises(LoadError, match="lacks amx_bf16, amx_tile"):
        BACKEND.load(artifact)
