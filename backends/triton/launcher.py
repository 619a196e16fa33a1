"""Launching the kernels of a file: arguments by name, static grids, on the device of the tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextvars import copy_context
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from moec.backends.triton.kernels.text import KernelFile
from moec.backends.triton.module import load_module, triton


@lru_cache(maxsize=16)
def target_of(device: torch.device) -> str:
    """The target text of a GPU: ``cuda:sm90``, ``hip:gfx942``; empty for anything else."""
    if device.type != "cuda":
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"hip:{properties.gcnArchName.partition(':')[0]}"
    return f"cuda:sm{properties.major}{properties.minor}"


def _with_descriptors(launch: Callable[[], object]) -> None:
    """Launch a kernel that makes tensor descriptors, with memory for them.

    Triton asks an allocator of the context, which another thread has not, and the user may have set one of their own.
    """

    def inside() -> None:
        triton().set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        launch()

    copy_context().run(inside)


class LaunchKernel(Protocol):
    """Launches a kernel of a file by its name."""

    def __call__(
        self,
        name: str,
        tokens: int,
        arguments: Mapping[str, Any],
        constants: Mapping[str, int],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None: ...


class Launcher:
    """The kernels of a file, callable by name.

    Args:
        file: The file.
    """

    def __init__(self, file: KernelFile) -> None:
        self.file = file
        self.module: ModuleType = load_module(file.text)

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
        """Launch a kernel.

        Args:
            name: Of the kernel.
            tokens: Its grid is for so many.
            arguments: At least its own, by name.
            constants: At least its own; ``PROGRAMS`` is the grid's.
            num_warps, num_stages: Of a program.
        """
        kernel = self.file.kernels[name]
        grid = kernel.grid(tokens, constants)
        given = [arguments[a.name] for a in kernel.arguments]
        fixed = {c: constants[c] for c in kernel.constants}
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        launch = partial(getattr(self.module, name)[grid], *given, **fixed, **options)
        if fixed.get("TMA"):
            _with_descriptors(launch)
        else:
            launch()


def on_device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the device of ``t`` while it lasts."""
    return torch.cuda.device_of(t) if torch.cuda.is_available() else contextlib.nullcontext()
