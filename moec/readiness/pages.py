"""``moec.huge_pages``: a model's weights on huge pages, where they lie."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.backends.cpu.huge_pages import move
from moec.ir.errors import MoecError


class HugePagesError(MoecError):
    """What was given holds no memory to move."""

    code = "huge-pages"


@dataclass
class HugePages:
    """What was moved.

    Attributes:
        moved: Bytes that lie on huge pages now.
        left: Bytes that do not, by reason.
        seconds: Taken for it.
    """

    moved: int = 0
    left: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.moved / 1e9:.2f} GB on huge pages, in {self.seconds:.1f} s"]
        lines += [f"{size / 1e9:.2f} GB left as they were: {reason}" for reason, size in self.left.most_common()]
        return "\n".join(lines)


def huge_pages(
    model: torch.nn.Module | Iterable[Tensor], *, progress: Callable[[int, int], None] | None = None
) -> HugePages:
    """Move the memory of a model's parameters and buffers to pages of 2 MB, in place.

    Addresses and contents stay, so nothing that holds the tensors notices; while it goes on, 2 MB more are in use.
    Kernels that read weights where they lie then translate far fewer addresses, which is worth the most on virtual
    machines. It is a matter of this process: call it when the weights are there, after loading. Where processes share
    memory since a fork, each would get its own copy, so call it before the fork.

    Args:
        model: A module, or tensors.
        progress: Called with the bytes done and those in all.

    Returns:
        What was moved, and what was not, with reasons: memory of other devices or mapped from files, no huge page free.

    Raises:
        HugePagesError: There is no tensor in ``model``.
    """
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else list(model)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise HugePagesError(
            f"nothing to move in a {type(model).__name__}", hint="give a module with weights, or a list of tensors"
        )
    found, start, done = HugePages(), time.perf_counter(), 0
    spans = _spans(tensors, found.left)
    total = sum(size for _, size in spans)
    for address, size in spans:
        for some, reason in move(address, size):
            done += some
            if reason:
                found.left[reason] += some
            else:
                found.moved += some
            if progress is not None:
                progress(done, total)
    found.seconds = time.perf_counter() - start
    return found


def _spans(tensors: list[Tensor], left: Counter[str]) -> list[tuple[int, int]]:
    """Address and bytes of every storage, once."""
    spans: dict[int, int] = {}
    for t in tensors:
        if t.device.type != "cpu" or t.layout != torch.strided:
            kind = "memory" if t.layout == torch.strided else "a sparse tensor"
            left[f"{kind} of the device {t.device.type}"] += t.numel() * t.element_size()
        elif t.untyped_storage().nbytes():
            spans[t.data_ptr() - int(t.storage_offset()) * t.element_size()] = t.untyped_storage().nbytes()
    return sorted(spans.items())
