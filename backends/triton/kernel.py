"""The kernel of one ``moe.experts`` program: buffers of static size, and launches that no count of rows decides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moec.backends.aten import ExpertsKernel as AtenExperts
from moec.backends.aten.spec import Params
from moec.backends.base import STACKS, PlacingKernel, placed
from moec.backends.cpu.operands import form_of, one_stride
from moec.backends.triton.backward import Backward, Rows
from moec.backends.triton.kernels.experts import up_biases, up_weights
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launcher import Launcher, LaunchKernel, on_device_of, target_of
from moec.backends.triton.launches.tiles import Launch, choose
from moec.backends.triton.module import interpreted
from moec.backends.triton.run import Run
from moec.backends.triton.spec import ALIGNED, Spec
from moec.ir.core import Op
from moec.ir.torch_dtypes import TO_TORCH

LEAST_ROWS, MOST_ROWS = 16, 64
"""Rows of a block in the backward: what tensor cores multiply at least; more do not fit a program's registers."""
_TABLES = 4096
"""Tables of addresses, and lists of experts, that are kept: equal layers share this kernel, and each has its own."""


@lru_cache(maxsize=256)
def launcher(spec: Spec, interpreted: bool) -> Launcher:
    """The kernels of a layer, loaded."""
    return Launcher(write_experts(spec, interpreted))


class TritonExperts(PlacingKernel):
    """Forward and GEMMs of the backward in generated Triton."""

    def __init__(self, op: Op, spec: Spec, target: str) -> None:
        self.spec, self.target = spec, target
        self.aten = AtenExperts(op)
        self.tables: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        launcher(spec, interpreted())

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        x, ids, weights = inputs[:3]
        tokens, spec = x.shape[0], self.spec
        if not tokens:
            return [x.new_empty((0, spec.width), dtype=TO_TORCH[spec.out_dtype])]
        params = self.aten.spec.params(inputs)
        up_nk, down_nk = form_of(params.up, spec.up_nk), form_of(params.down, spec.down_nk)
        if up_nk is None or down_nk is None or not (one_stride(params.up) and one_stride(params.down)):
            return self.aten.forward(inputs)  # no side of a matrix is contiguous, or not the same one of all
        lying = spec.lying(up_nk, down_nk, self._aligned(params))
        launch = self.launch(lying, tokens, x.device)
        with on_device_of(x):
            return [self._run(lying, launch, x, ids, weights, params)]

    def launch(self, spec: Spec, tokens: int, device: torch.device) -> Launch:
        """How the kernels run for so many tokens."""
        return choose(spec, tokens, target_of(device) or self.target)

    def launcher(self, spec: Spec) -> LaunchKernel:
        """The kernels of the layer, its weights as they lie."""
        return launcher(spec, interpreted())

    def backward_into(
        self,
        grads: Sequence[Tensor | None],
        inputs: list[Tensor],
        needs: Sequence[bool],
        into: Sequence[Tensor | None],
        only: Sequence[int] | None = None,
    ) -> list[Tensor | None]:
        (grad,) = grads
        x, ids = inputs[:2]
        params = self.aten.spec.params(inputs)
        if grad is None or not x.shape[0] or self.spec.fp8 or not (one_stride(params.up) and one_stride(params.down)):
            return self.aten.backward_into(grads, inputs, needs, into, only)
        launch = choose(self.spec, x.shape[0], target_of(x.device) or self.target)
        block_m = min(MOST_ROWS, max(LEAST_ROWS, launch.up.block_m))
        tables = [None if self.aten.spec.stacked else self._table(t) for t in (params.up, params.down)]
        with on_device_of(x):
            run = Run(self.spec, launch, launcher(self.spec, interpreted()), x.shape[0])
            blocks = run.sort(ids.to(torch.int64).contiguous(), block_m)
            rows = Rows.of(blocks, block_m, ids.numel(), self.spec.experts)
            some = None if only is None else self._sent(tuple(only), x.device)
            aligned = self._aligned(params)
            found = Backward(self.aten.spec, self.spec.dtype, rows, tables, aligned, some).gradients(
                grad, inputs, needs
            )
            if some is None:
                return placed(found, into)
            made = placed(found[:STACKS], into[:STACKS])
            for g, place in zip(found[STACKS:], into[STACKS:], strict=True):
                made.append(g if g is None or place is None else place.index_copy_(0, some, g))
            return made

    def _aligned(self, params: Params) -> bool:
        """Whether every weight behind a table begins where wide loads may; strides of stacked ones are seen."""
        return self.spec.stacked or not any(t.data_ptr() % ALIGNED for t in (*params.up, *params.down))

    def _run(self, spec: Spec, launch: Launch, x: Tensor, ids: Tensor, weights: Tensor, params: Params) -> Tensor:
        tokens = x.shape[0]
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        values: dict[str, Any] = {
            "x": x,
            "x_s": x.stride(0),
            "ids": ids.to(torch.int64).contiguous(),
            "weights": weights.contiguous(),
            "slots_n": tokens * spec.top_k,
        }
        up = values | self._up(spec, params)
        down = (
            values
            | self._weight("w", params.down, 0, spec.down_nk == self.spec.down_nk)
            | self._scale("w", params.down_scale, 0)
            | self._bias("b", params.down_bias, 0)
        )
        captures = {f"c{i}_at": c.contiguous() for i, c in enumerate(params.captures)}
        post_captures = {f"c{i}_at": c.contiguous() for i, c in enumerate(params.post_captures)}
        run = Run(spec, launch, self.launcher(spec), tokens)
        return run.layer(up | captures, down, captures, post_captures)

    def _up(self, spec: Spec, params: Params) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, name in enumerate(up_weights(spec)):
            found |= self._weight(name, params.up, part, spec.up_nk == self.spec.up_nk)
            found |= self._scale(name, params.up_scale, part)
        for part, name in enumerate(up_biases(spec)):
            found |= self._bias(name, params.up_bias, part)
        return found

    def _weight(self, name: str, tensors: list[Tensor], part: int, as_named: bool) -> dict[str, Any]:
        """A weight as the kernels take it; it may lie transposed to what the op calls it."""
        rows = -2 if as_named else -1
        if self.spec.stacked:
            t = tensors[part] if tensors[part].dim() == 3 else tensors[part][None]  # of an only expert
            return {name: t, f"{name}_se": t.stride(0), f"{name}_s": t.stride(rows)}
        each = tensors[part * self.spec.experts : (part + 1) * self.spec.experts]
        return {name: self._table(each), f"{name}_s": each[0].stride(rows)}

    def _scale(self, name: str, tensors: list[Tensor], part: int) -> dict[str, Any]:
        return {f"{name}_scale": tensors[part].contiguous()} if tensors else {}

    def _bias(self, name: str, tensors: list[Tensor], part: int) -> dict[str, Any]:
        if not tensors:
            return {}
        if self.spec.stacked:
            t = tensors[part] if tensors[part].dim() == 2 else tensors[part][None]
            t = t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
            return {name: t, f"{name}_se": t.stride(0)}
        each = tensors[part * self.spec.experts : (part + 1) * self.spec.experts]
        return {name: self._table(each)}

    def _table(self, tensors: list[Tensor]) -> Tensor:
        """Addresses on the device. They are sent once for weights that stay where they are."""
        return self._sent(tuple(t.data_ptr() for t in tensors), tensors[0].device)

    def _sent(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers on the device, sent there once: a CUDA graph captures no copy from the host."""
        found = self.tables.get((numbers, device))
        if found is None:
            host = torch.tensor(numbers, dtype=torch.int64)
            found = host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
            self.tables[numbers, device] = found
            while len(self.tables) > _TABLES:
                self.tables.pop(next(iter(self.tables)), None)
        return found
