"""Embedded kernels against plain loops in f64, at every instruction set of this machine, through their C functions."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.backends.aten import AtenBackend
from moec.backends.base import program_op
from moec.backends.cpu.aot import Embedded, archive, embed_experts, embed_route
from moec.backends.cpu.aot.archive import TORCH_HEADERS
from moec.backends.cpu.isa import LEVELS
from moec.ir.core import Graph
from moec.targets import cpu_flags
from tests.backends.cases import TOLERANCE, ExpertsCase, case_id, loop_experts, relative_error, route_graph

CASES = [
    ExpertsCase(layout="interleaved", up_form="kn", down_form="kn", bias=True),
    ExpertsCase(layout="separate", stacked=False, bias=True),
    ExpertsCase(layout="rows", captures=True, post=True, bias=True, sentinels=True),
    ExpertsCase(hidden=64, inner=32, dtype="bf16"),
]
ADDRESSED = ExpertsCase(experts=4, hidden=20, inner=24)
ROUTERS = {
    "softmax": route_graph(8, "bf16", result="bf16", k=3, renormalize=True),
    "groups": route_graph(
        8, bias=True, k=2, scoring="sigmoid", groups=4, top_groups=2, group_score="top2_sum", group_fill=0.0,
        renormalize=True, renorm_eps=1e-20, scale=2.5,
    ),
}  # fmt: skip
HERE = [name for name, isa in LEVELS.items() if isa.needs <= cpu_flags()]
TOKENS = (0, 1, 33)
pytestmark = [
    pytest.mark.skipif(not HERE or shutil.which("g++") is None, reason="no x86-64 with AVX2, or no g++"),
    pytest.mark.slow,  # kernels of all levels are built
]


@dataclass
class Built:
    """A library with the C functions of all cases, and what each is called."""

    path: Path
    names: dict[str, str]


def handles_of(tensors: list[Tensor]) -> list[int]:
    """torch's C interface's handles of tensors; they are not freed."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return [pointer(c, None) for c in torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)]


def tensor_of(handle: ctypes.c_void_p) -> Tensor:
    """The tensor behind a handle, which is used up."""
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    made: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule(handle, None, None))
    return made


def experts(case: ExpertsCase, addressed: bool = False) -> Embedded:
    return embed_experts(program_op(case.graph()), "cpu", case.up_form == "nk", case.down_form == "nk", addressed)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The cases' code as a shared library; a shim for each shows what is hidden in an artifact."""
    made = {case_id(c): experts(c) for c in CASES} | {"addressed": experts(ADDRESSED, addressed=True)}
    made |= {name: embed_route(program_op(graph), "cpu") for name, graph in ROUTERS.items()}
    folder = tmp_path_factory.mktemp("embedded")
    text = "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
    for embedded in made.values():
        names = re.findall(r"(\w+)(?:,|\))", embedded.declaration)
        shown = embedded.declaration.replace("aoti_torch_cpu_", "call_", 1)
        text += f'extern "C" {embedded.declaration};\nextern "C" __attribute__((visibility("default"))) {shown} {{\n'
        text += f"    return aoti_torch_cpu_{embedded.name}({', '.join(names)});\n}}\n"
    (folder / "shims.cpp").write_text(text)
    library, so = archive(list(made.values()), "cpu"), folder / "cases.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    command = ["g++", "-shared", "-fPIC", f"-I{TORCH_HEADERS}", str(folder / "shims.cpp"), str(library), "-o", str(so)]
    subprocess.run([*command, f"-L{torch_lib}", "-ltorch_cpu", "-lgomp"], check=True)
    return Built(so, {key: embedded.name for key, embedded in made.items()})


@pytest.fixture(params=HERE)
def call(request: pytest.FixtureRequest, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A case's C function on tensors; a copy of the library has chosen no level yet."""
    monkeypatch.setenv("MOEC_ISA", request.param)
    library = ctypes.CDLL(shutil.copy(built.path, tmp_path / "copy.so"))

    def run(key: str, before: list[Tensor], listed: list[Tensor] | None, results: int) -> list[Tensor]:
        handles = handles_of([*before, *(listed or [])])
        words: list[Any] = [ctypes.c_void_p(h) for h in handles[: len(before)]]
        if listed is not None:
            words += [(ctypes.c_void_p * max(1, len(listed)))(*handles[len(before) :]), ctypes.c_int64(len(listed))]
        out = [ctypes.c_void_p() for _ in range(results)]
        assert getattr(library, f"call_{built.names[key]}")(*words, *map(ctypes.byref, out)) == 0
        return [tensor_of(o) for o in out]

    return run


Call = Callable[[str, list[Tensor], list[Tensor] | None, int], list[Tensor]]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_experts(case: ExpertsCase, call: Call) -> None:
    for tokens in TOKENS:
        for skew in ("uniform", "one_expert", "half_empty"):
            inputs = case.inputs(tokens, skew)
            (got,) = call(case_id(case), inputs[:3], inputs[3:], 1)
            assert relative_error(got, loop_experts(case, inputs)) < TOLERANCE[case.dtype]


def test_experts_at_addresses(call: Call) -> None:
    """Gates, ups and downs of all experts lie apart; the op gets nothing but where."""
    inputs = ADDRESSED.inputs(33)
    up, down = inputs[3:]
    gates, ups = ([w.clone() for w in half] for half in up.split(ADDRESSED.inner, dim=1))
    downs = [w.clone() for w in down]
    tables = [torch.tensor([t.data_ptr() for t in group]) for group in ([*gates, *ups], downs)]
    (got,) = call("addressed", inputs[:3], tables, 1)
    assert relative_error(got, loop_experts(ADDRESSED, inputs)) < TOLERANCE["f32"]


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str, call: Call) -> None:
    graph: Graph = ROUTERS[name]
    kernel = AtenBackend().load(AtenBackend().lower(graph, "cpu"))
    generator = torch.Generator().manual_seed(0)
    for tokens in TOKENS:
        logits = torch.randn(tokens, 8, generator=generator).to(torch.bfloat16 if name == "softmax" else torch.float32)
        inputs = [logits] if name == "softmax" else [logits, torch.randn(8, generator=generator)]
        weights, ids = kernel.forward(inputs)
        got = call(name, inputs, None, 2)
        assert torch.equal(got[1], ids)
        torch.testing.assert_close(got[0], weights, rtol=1e-6, atol=1e-6)  # a unit in the last place of an exponential


def test_bad_ids_are_told(built: Built, tmp_path: Path) -> None:
    """An exception of C++ cannot cross into Python: another process dies of it, with the message."""
    case = CASES[1]
    code = f"""
import ctypes, torch
library = ctypes.CDLL({str(built.path)!r})
from tests.aot.test_embedded_numbers import handles_of
from tests.backends.cases import ExpertsCase
inputs = {case!r}.inputs(3)
inputs[1][1, 1] = 7
handles = handles_of(inputs)
table = (ctypes.c_void_p * len(inputs[3:]))(*handles[3:])
out = ctypes.c_void_p()
words = [ctypes.c_void_p(h) for h in handles[:3]]
library.call_{built.names[case_id(case)]}(*words, table, ctypes.c_int64(len(inputs[3:])), ctypes.byref(out))
"""
    root = Path(__file__).resolve().parents[2]
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert made.returncode != 0 and "expert id 7 is out of range: there are 5 experts" in made.stderr
