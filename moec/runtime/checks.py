"""Checks that run inside the ops, in compiled graphs too: what would otherwise be silent nonsense or a crash.

Modes: ``warn`` (default) warns once per block about NaN router logits and goes on as PyTorch would; ``strict`` makes
that an error; ``off`` leaves it out. Expert ids out of range and tensors that do not fit together are always errors.

Around kernels that do not wait for the device, checks of values do not wait either: an error is raised by the device,
some time later, and there are no warnings.
"""

from __future__ import annotations

import math
import threading
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moec.ir.errors import MoecError, nearest

if TYPE_CHECKING:
    from moec.runtime.programs import Program

MODES = ("warn", "strict", "off")


class MoecWarning(UserWarning):
    """Something in a MoE block that PyTorch would pass over in silence."""


class CheckError(MoecError):
    """A MoE block was given values it cannot compute with."""

    code = "check"


_mode = "warn"
_warned: set[str] = set()
_LOCK = threading.Lock()


def check_mode(mode: str) -> str:
    """``mode`` if it is one.

    Raises:
        CheckError: It is none; the message names the nearest.
    """
    if mode not in MODES:
        raise CheckError(f"unknown check mode {mode!r}; {nearest(mode, MODES)}")
    return mode


def set_mode(mode: str) -> None:
    """Set the process's mode, for programs that were compiled without one of their own."""
    global _mode
    _mode = check_mode(mode)


def reset() -> None:
    """Forget which blocks have been warned about."""
    with _LOCK:
        _warned.clear()


def block_name(program: Program) -> str:
    """How messages call the block of a program."""
    return f"MoE block {program.label!r}" if program.label else "a MoE block"


def check_logits(logits: Tensor, program: Program) -> None:
    """Look for NaN among router logits [T, E], as the program's mode says.

    One sum finds them: it is NaN if a logit is, and only then (or for opposite infinities) is looked closer.
    """
    mode = program.checks or _mode
    if mode == "strict" and program.asynchronous:
        torch._assert_async(~torch.isnan(logits).any(), f"{block_name(program)}: NaN in the router logits")
    if (
        mode == "off"
        or program.asynchronous
        or not math.isnan(logits.sum().item())
        or not bool(torch.isnan(logits).any())
    ):
        return
    rows = int(torch.isnan(logits).any(dim=-1).sum())
    message = f"{block_name(program)}: NaN in the router logits of {rows} of {logits.shape[0]} tokens"
    if mode == "strict":
        raise CheckError(message, source=program.op.loc.source or None, hint="look for NaN in what feeds the router")
    with _LOCK:
        if program.key in _warned:
            return
        _warned.add(program.key)
    warnings.warn(f"{message}; results are as in eager PyTorch (told once per block)", MoecWarning, stacklevel=2)


def check_ids(ids: Tensor, experts: int, program: Program) -> None:
    """Refuse expert ids (int[T, k]) outside ``0 .. experts-1``.

    Raises:
        CheckError: with block, id and the number of experts.
    """
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if program.asynchronous:
        text = f"{block_name(program)}: an expert id is out of range: the layer has {experts} experts"
        torch._assert_async((low >= 0) & (high < experts), text)
        return
    lowest, highest = low.item(), high.item()
    if lowest >= 0 and highest < experts:
        return
    raise CheckError(
        f"{block_name(program)}: expert id {lowest if lowest < 0 else highest} is out of range: "
        f"the layer has {experts} experts (ids 0 to {experts - 1})",
        source=program.op.loc.source or None,
        hint="check the router's output; ids of other ranks must be declared as sentinels",
    )


def check_same(x: Tensor, params: list[Tensor], gemm_weights: int, program: Program) -> None:
    """Refuse weights on another device than ``x``, or GEMM weights (the first ones of ``params``) of another type.

    Raises:
        CheckError: naming both.
    """
    device, dtype = x.device, x.dtype
    for i, p in enumerate(params):
        if p.device != device:
            raise CheckError(
                f"{block_name(program)}: the tokens are on {device}, weight {i} is on {p.device}",
                hint="move the model or its input, so that both are on one device",
            )
        if i < gemm_weights and p.dtype != dtype:
            raise CheckError(
                f"{block_name(program)}: the tokens are {dtype}, weight {i} is {p.dtype}",
                hint="cast the model or its input, so that both have one type",
            )
