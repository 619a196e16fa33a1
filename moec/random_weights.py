"""Made-up weights at the speed of memory: for demos and for looking at a model whose checkpoint is not at hand.

Drawing 2·10⁹ normal numbers takes minutes on a small machine. Here one block is drawn and laid out again and again, its
length a prime, so that no two rows, experts or layers of common sizes are equal. Good for structure, numerics and time;
no statistics of the weights should be read from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_BLOCK = 8_388_617  # elements, a prime a little above 2**23
_STD = 0.02  # the initializer range of most language models


@dataclass(frozen=True)
class MadeUp:
    """Values of a parameter that are not in memory: what one block gives, read in a circle from ``offset`` on."""

    shape: tuple[int, ...]
    block: Tensor
    offset: int

    def pieces(self) -> Iterator[Tensor]:
        """The values in order, as parts of the block; nothing is copied."""
        left, at = math.prod(self.shape), self.offset
        while left:
            piece = self.block[at : at + left]
            yield piece
            left -= piece.numel()
            at = (at + piece.numel()) % self.block.numel()

    def tensor(self) -> Tensor:
        """The values in memory of their own."""
        made = torch.empty(self.shape, dtype=self.block.dtype)
        return self.copy_to(made)

    def copy_to(self, to: Tensor) -> Tensor:
        """Overwrite ``to``, of the same shape; returns it."""
        if not to.is_contiguous():
            return to.copy_(self.tensor())
        flat, done = to.view(-1), 0
        for piece in self.pieces():
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
        return to


def made_up(model: torch.nn.Module, *, std: float = _STD, seed: int = 0) -> Iterator[tuple[str, Parameter, MadeUp]]:
    """Every parameter with its values: matrices and vectors are noise, norms and scales one, biases zero.

    Args:
        model: Its parameters' shapes and types count.
        std: Standard deviation of the noise.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    block = torch.empty(_BLOCK).normal_(0.0, std, generator=generator)
    blocks: dict[torch.dtype, Tensor] = {}
    offset = 0
    for name, parameter in model.named_parameters():
        leaf, shape, dtype = name.rpartition(".")[2], tuple(parameter.shape), parameter.dtype
        small = parameter.dim() <= 1 and max(1, parameter.numel())
        if leaf.endswith("scale_inv"):
            yield name, parameter, MadeUp(shape, torch.ones(max(1, parameter.numel()), dtype=dtype), 0)
            continue
        if small and "norm" in name.lower():
            yield name, parameter, MadeUp(shape, torch.full((small,), 0.0 if "bias" in leaf else 1.0, dtype=dtype), 0)
        elif small and "bias" in leaf:
            yield name, parameter, MadeUp(shape, torch.zeros(small, dtype=dtype), 0)
        elif parameter.is_floating_point():
            yield name, parameter, MadeUp(shape, blocks.setdefault(dtype, block.to(dtype)), offset)
            offset = (offset + parameter.numel()) % _BLOCK


def fill_random(
    model: torch.nn.Module,
    *,
    std: float = _STD,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> torch.nn.Module:
    """Overwrites every parameter in place with ``made_up`` values.

    Args:
        model: A model whose memory is allocated; its values do not matter. Buffers are left alone.
        std: Standard deviation of the noise.
        seed: Of the generator.
        progress: Called after every parameter with its name and its number of elements.

    Returns:
        ``model``.
    """
    with torch.no_grad():
        for name, parameter, values in made_up(model, std=std, seed=seed):
            values.copy_to(parameter)
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
