"""Made-up weights at the speed of memory: for demos and for looking at a model whose checkpoint is not at hand.

Drawing 2·10⁹ normal numbers takes minutes on a small machine. Here one block is drawn and laid out again and again, its
length a prime, so that no two rows, experts or layers of common sizes are equal. Good for structure, numerics and time;
no statistics of the weights should be read from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_BLOCK = 8_388_617  # elements, a prime a little above 2**23
_STD = 0.02  # the initializer range of most language models


def fill_random(
    model: torch.nn.Module,
    *,
    std: float = _STD,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> torch.nn.Module:
    """Overwrites every parameter in place: matrices and vectors with noise, norms with one, biases with zero.

    Args:
        model: A model whose memory is allocated; its values do not matter. Buffers are left alone.
        std: Standard deviation of the noise.
        seed: Of the generator.
        progress: Called after every parameter with its name and its number of elements.

    Returns:
        ``model``.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(_BLOCK).normal_(0.0, std, generator=generator)
    blocks: dict[torch.dtype, torch.Tensor] = {}
    offset = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if parameter.dim() <= 1 and "norm" in name.lower():
                parameter.fill_(0.0 if "bias" in leaf else 1.0)
            elif parameter.dim() <= 1 and "bias" in leaf:
                parameter.zero_()
            elif parameter.is_floating_point():
                typed = blocks.setdefault(parameter.dtype, block.to(parameter.dtype))
                offset = _lay(parameter, typed, offset)
            if progress is not None:
                progress(name, parameter.numel())
    return model


def random_transformer(
    auto: Any, config: Any, dtype: torch.dtype, progress: Callable[[str, int], None] | None = None
) -> torch.nn.Module:
    """A transformers model filled by ``fill_random``; its own initialisation, drawn number by number, is skipped.

    Args:
        auto: An auto class such as ``AutoModelForCausalLM``.
        config: The model's configuration.
        dtype: Element type of the parameters.
        progress: As for ``fill_random``.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    return fill_random(model, progress=progress)


def _lay(parameter: torch.Tensor, block: torch.Tensor, offset: int) -> int:
    """Copies ``block`` over ``parameter`` in a circle from ``offset`` on; returns where the next one starts."""
    in_place = parameter.is_contiguous()
    flat = parameter.view(-1) if in_place else torch.empty(parameter.numel(), dtype=block.dtype)
    done = 0
    while done < flat.numel():
        count = min(flat.numel() - done, block.numel() - offset)
        flat[done : done + count].copy_(block[offset : offset + count])
        done += count
        offset = (offset + count) % block.numel()
    if not in_place:
        parameter.copy_(flat.view(parameter.shape))
    return offset
