"""Which kernels a call launches, without a device: the call itself, on tensors without memory.

A launcher that notes takes the launcher's place, so that what is compiled ahead of time is what is launched later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.backends.triton.kernels.experts import up_biases, up_weights
from moec.backends.triton.kernels.expression import Elementwise
from moec.backends.triton.kernels.text import Argument, KernelFile
from moec.backends.triton.launches.tiles import Launch
from moec.backends.triton.run import Run
from moec.backends.triton.spec import ALIGNED, Spec
from moec.ir.torch_dtypes import TO_TORCH

MOST_TOKENS = 16384
"""Kernels are compiled for calls of so many tokens at most; larger ones are launched as those are."""


@dataclass(frozen=True)
class Call:
    """One launch.

    Attributes:
        kernel: Its name.
        constants: Its compile-time parameters.
        warps, stages: Of a program.
        aligned: Arguments that are multiples of 16.
    """

    kernel: str
    constants: tuple[tuple[str, int], ...]
    warps: int
    stages: int
    aligned: frozenset[str]


class Recorder:
    """Stands in a launcher's place and notes what it is asked for.

    Args:
        file: The kernels.

    Attributes:
        calls: In order.
    """

    def __init__(self, file: KernelFile) -> None:
        self.file = file
        self.calls: list[Call] = []

    def __call__(
        self,
        name: str,
        tokens: int,
        arguments: Mapping[str, Any],
        constants: Mapping[str, int],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        kernel = self.file.kernels[name]
        self.calls.append(
            call_of(kernel.arguments, kernel.constants, name, arguments, constants, num_warps, num_stages)
        )


def call_of(
    declared: tuple[Argument, ...], fixed: tuple[str, ...], name: str, arguments: Mapping[str, Any],
    constants: Mapping[str, int], warps: int, stages: int,
) -> Call:  # fmt: skip
    """The launch of a kernel with these values."""
    # Numbers of 32 bits count tokens and differ from call to call; those of 64 are strides.
    aligned = frozenset(a.name for a in declared if a.type != "i32" and not _number(arguments[a.name]) % ALIGNED)
    return Call(name, tuple((c, int(constants[c])) for c in fixed), warps, stages, aligned)


def _number(value: Any) -> int:
    """What alignment is about: a tensor's address (memory that is not there yet is aligned), or the number itself."""
    return int(value.data_ptr()) if isinstance(value, Tensor) else int(value)


def calls(spec: Spec, launch: Launch, tokens: int, file: KernelFile) -> list[Call]:
    """What a call of so many tokens launches, on contiguous tensors."""
    recorder = Recorder(file)
    run = Run(spec, launch, recorder, tokens)
    with torch.device("meta"):
        up, down, captures, post = _values(spec, tokens)
        run.layer(up, down, captures, post)
    return recorder.calls


def _values(spec: Spec, tokens: int) -> tuple[dict[str, Any], ...]:
    """Arguments by name, as the kernel of a layer collects them from contiguous tensors."""
    dtype = TO_TORCH[spec.dtype]
    common = {
        "x": torch.empty(tokens, spec.hidden, dtype=dtype),
        "x_s": spec.hidden,
        "ids": torch.empty(tokens, spec.top_k, dtype=torch.int64),
        "weights": torch.empty(tokens, spec.top_k, dtype=TO_TORCH[spec.weight_dtype]),
        "slots_n": tokens * spec.top_k,
    }
    outputs = spec.up * (2 if spec.layout in ("concat", "interleaved") else 1)
    up, down = dict(common), dict(common)
    for name in up_weights(spec):
        up |= _weight(spec, name, outputs, spec.hidden, spec.up_nk)
    for name in up_biases(spec):
        up |= {name: _table(spec, outputs), f"{name}_se": outputs}
    down |= _weight(spec, "w", spec.out, spec.inner, spec.down_nk)
    if spec.down_bias:
        down |= {"b": _table(spec, spec.out), "b_se": spec.out}
    activation = spec.activation
    captured = {f"c{i}_at": torch.empty(1, dtype=TO_TORCH[d]) for i, (d, _) in enumerate(activation.captures)}
    if isinstance(activation, Elementwise):
        up |= captured
    post = () if spec.post is None else spec.post.captures
    return up, down, captured, {f"c{i}_at": torch.empty(1, dtype=TO_TORCH[d]) for i, (d, _) in enumerate(post)}


def _weight(spec: Spec, name: str, outputs: int, inputs: int, nk: bool) -> dict[str, Any]:
    row = inputs if nk else outputs
    if not spec.stacked:
        return {name: torch.empty(spec.experts, dtype=torch.int64), f"{name}_s": row}
    weight = torch.empty(spec.experts, outputs, inputs, dtype=TO_TORCH[spec.element])
    scale = {f"{name}_scale": torch.empty(spec.experts, 1, 1)} if spec.fp8 else {}
    return {name: weight, f"{name}_se": outputs * inputs, f"{name}_s": row, **scale}


def _table(spec: Spec, width: int) -> Tensor:
    return torch.empty(spec.experts, width, dtype=TO_TORCH[spec.dtype])
