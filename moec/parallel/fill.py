"""Replacing a model's parameters by others, and buffers on the meta device by values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moec.parallel.plan import ParallelError


def fill(
    model: nn.Module,
    make: Callable[[str, nn.Parameter], Tensor],
    read: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Replace every parameter by ``make(name, parameter)``; tied ones stay tied, under their first name.

    One is made after the other and the old one let go, so that no more than one is there twice.

    Args:
        model: The model.
        make: Gives the new parameter's tensor.
        read: Gives the values of saved buffers on the meta device; None leaves those to be loaded.
    """
    names: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for own, old in module._parameters.items():
            if old is not None:
                name = names.setdefault(id(old), f"{prefix}.{own}" if prefix else own)
                places.setdefault(name, []).append((module, own))
    for name, at in places.items():
        module, own = at[0]
        old = module._parameters[own]
        assert old is not None
        new = nn.Parameter(make(name, old), requires_grad=old.requires_grad)
        for module, own in at:
            module._parameters[own] = new
        del old
    _fill_buffers(model, read)


def _fill_buffers(model: nn.Module, read: Callable[[str, Tensor], Tensor] | None) -> None:
    """Give buffers on the meta device their values: those of the weights, or what transformers computes for them.

    Raises:
        ParallelError: Nobody knows a buffer's values.
    """
    for prefix, module in model.named_modules():
        blank = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        for name, b in list(blank.items()):
            if name not in module._non_persistent_buffers_set:
                full = f"{prefix}.{name}" if prefix else name
                module._buffers[name] = torch.empty_like(b, device="cpu") if read is None else read(full, b)
                del blank[name]
        if not blank:
            continue
        initialise = getattr(model, "_init_weights", None)
        if module._parameters or initialise is None:
            raise ParallelError(
                f"the buffer {prefix}.{next(iter(blank))} is on the meta device and nothing says what it holds",
                hint="build the model so that buffers which are not saved are real",
            )
        for name, b in blank.items():
            module._buffers[name] = torch.empty_like(b, device="cpu")
        initialise(module)
