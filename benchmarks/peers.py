"""The layer as others run it. Each of them is optional: absent or refusing, it says why and is left out.

Kernels in native libraries are tried in a process of their own first (probe.py): one of them ends the process where it
lacks an instruction.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moec.targets import cpu_flags
from ours import Call, Weights
from routing import Batch
from shapes import DTYPES, Shape

NATIVE = ("vllm", "sglang", "zentorch")
PEERS = ("transformers", "eager", *NATIVE)
VARIABLES = {"vllm": "MOEC_BENCH_VLLM", "zentorch": "MOEC_BENCH_ZENTORCH"}
_MULTIPLE = 32  # of widths, for the kernels in vLLM's library
_PROBE_S = 120


class RefusalError(Exception):
    """Why a peer is left out."""


@dataclass
class Implementation:
    """One way to run the layer.

    Attributes:
        calls: One for each copy of the weights.
        packed: It reads a copy of the weights of its own.
        release: Gives back what the calls hold elsewhere.
    """

    name: str
    calls: list[Call]
    packed: bool = False
    release: Callable[[], None] = lambda: None


def make_peer(name: str, shape: Shape, copies: Sequence[Weights]) -> Implementation:
    """The peer of that name on these weights.

    Raises:
        RefusalError: It is not installed, or cannot run this layer.
    """
    maker = {
        "transformers": lambda: _transformers("transformers", "grouped_mm", shape, copies),
        "eager": lambda: _transformers("eager", "eager", shape, copies),
        "vllm": lambda: _vllm(shape, copies),
        "sglang": lambda: _sglang(shape, copies),
        "zentorch": lambda: _zentorch(copies),
    }[name]
    try:
        return maker()
    except (ImportError, OSError, RuntimeError) as error:
        raise RefusalError(_first_line(error)) from error


def probe(name: str, dtype: str) -> str | None:
    """Runs a native peer on a tiny layer in a process of its own; returns why it cannot be used, or None."""
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), name, dtype]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        made = subprocess.run(command, capture_output=True, text=True, env=env, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer on a tiny layer within {_PROBE_S} s"
    lines = made.stdout.splitlines()
    if made.returncode == 0 and lines:
        answer = json.loads(lines[-1])
        return None if answer["reason"] is None else str(answer["reason"])
    said = [line.strip() for line in made.stderr.splitlines() if line.strip()]
    last = next((s for s in said if "what():" in s), said[-1] if said else "")
    return f"it ends its process (status {made.returncode}): {last.removeprefix('what():').strip()[:160]}"


def set_paths(paths: dict[str, str | None]) -> None:
    """Folders given on the command line; the environment carries them to the probes."""
    for name, path in paths.items():
        if path:
            os.environ[VARIABLES[name]] = path


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _transformers(name: str, kind: str, shape: Shape, copies: Sequence[Weights]) -> Implementation:
    """transformers' experts: ``grouped_mm``, its default on the CPU, or the loop of the model's own code."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    make: Any = Qwen3MoeExperts
    config = SimpleNamespace(
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        hidden_act="silu",
        _experts_implementation=kind,
    )

    def bind(w: Weights) -> Call:
        with torch.device("meta"):
            module: torch.nn.Module = make(config)
        module.gate_up_proj = torch.nn.Parameter(w.up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(w.down, requires_grad=False)
        return lambda batch: module(batch.x, batch.ids, batch.weights)

    return Implementation(name, [bind(w) for w in copies])


def _folder(name: str) -> Path:
    """The folder of an installed package, or of one that was named without being installed here."""
    given = os.environ.get(VARIABLES[name])
    if given:
        candidates = [Path(given), Path(given) / name]
    else:
        spec = importlib.util.find_spec(name)
        candidates = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    found = next((c for c in candidates if any(c.glob("*.so"))), None)
    if found is None:
        raise RefusalError(f"nothing in {given}" if given else f"not installed (or give --{name} PATH)")
    return found


def _load_vllm() -> None:
    """The library of vLLM's CPU wheel that vLLM itself would choose here."""
    flags = cpu_flags()
    level = "" if "avx512_bf16" in flags else "_AVX512" if "avx512f" in flags else "_AVX2"
    torch.ops.load_library(str(_folder("vllm") / f"_C{level}.abi3.so"))


def _check_multiple(shape: Shape) -> None:
    if shape.hidden % _MULTIPLE or shape.inner % _MULTIPLE:
        raise RefusalError(f"widths {shape.hidden} and {shape.inner} are not both multiples of {_MULTIPLE}")


def _vllm(shape: Shape, copies: Sequence[Weights]) -> Implementation:
    """vLLM's ``cpu_fused_moe`` on packed weights: its AMX kernel, or its portable one where there is no AMX."""
    _check_multiple(shape)
    _load_vllm()
    ops = torch.ops._C
    # vLLM's own choice (model_executor/layers/fused_moe/experts/cpu_moe.py): AMX for bf16 alone.
    isa = "amx" if "amx_bf16" in cpu_flags() and copies[0].up.dtype == torch.bfloat16 else "vec"
    if isa == "amx" and not torch.cpu._init_amx():  # vLLM asks for the tiles when it starts its threads
        raise RefusalError("the operating system lets this process use no AMX tiles")

    def pack(w: Tensor) -> Tensor:
        packed = torch.empty_like(w)
        ops.prepack_moe_weight(w, packed, isa)
        return packed

    def bind(w: Weights) -> Call:
        up, down = pack(w.up), pack(w.down)

        def run(b: Batch) -> Tensor:
            out = torch.empty_like(b.x)
            ops.cpu_fused_moe(out, b.x, up, down, None, None, b.weights, b.ids_i32, False, "silu", isa)
            return out

        return run

    return Implementation("vllm", [bind(w) for w in copies], packed=True)


def _sglang(shape: Shape, copies: Sequence[Weights]) -> Implementation:
    """SGLang's ``fused_experts_cpu``, which vLLM's wheel carries, on weights packed for it."""
    _check_multiple(shape)
    _load_vllm()
    ops = torch.ops._C
    if not hasattr(ops, "fused_experts_cpu"):
        raise RefusalError("vLLM's library for this processor does not hold fused_experts_cpu")
    unquantized = 0

    def bind(w: Weights) -> Call:
        up, down = ops.convert_weight_packed(w.up), ops.convert_weight_packed(w.down)

        def run(b: Batch) -> Tensor:
            out = torch.empty_like(b.x)
            ops.fused_experts_cpu(out, b.x, up, down, b.weights, b.ids_i32, unquantized, *[None] * 10, True)
            return out

        return run

    return Implementation("sglang", [bind(w) for w in copies], packed=True)


def _zentorch(copies: Sequence[Weights]) -> Implementation:
    """AMD's ``zentorch_fused_moe``, which vLLM uses on AMD's processors; it packs weights at the first call."""
    torch.ops.load_library(str(_folder("zentorch") / "libzentorch_stable.so"))
    ops = torch.ops.zentorch

    def bind(w: Weights) -> Call:
        def run(b: Batch) -> Tensor:
            out = torch.empty_like(b.x)
            ops.zentorch_fused_moe(out, b.x, w.up, w.down, None, None, b.weights, b.ids_i32, False, "silu")
            return out

        return run

    return Implementation("zentorch", [bind(w) for w in copies], True, ops.zentorch_flush_moe_weight_cache)


def wanted_peers(dtype: str, names: Sequence[str], tell: Callable[[str], None]) -> list[str]:
    """Those of ``names`` that run here at all, the others told with the reason."""
    assert dtype in DTYPES
    found = []
    for name in names:
        reason = probe(name, dtype) if name in NATIVE else None
        if reason is None:
            found.append(name)
        else:
            tell(f"{name} is left out: {reason}")
    return found
