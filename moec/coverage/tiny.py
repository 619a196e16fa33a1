"""A family's model with random weights, small enough to compile in seconds, that really routes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.coverage.families import Family
from moec.coverage.overrides import override
from moec.coverage.shrink import VOCAB, shrink
from moec.ir.errors import MoecError

BATCH, LENGTH = 3, 11  # 33 tokens: no multiple of what kernels like
MAX_PARAMETERS = 3_000_000
WEIGHT_STD = 0.1
NOISE_STD = 0.05
_FIRST_PLAIN_TOKEN = 3  # 0, 1 and 2 are padding, beginning and end
_WEIGHT_SEED = 0


class NoExpertsError(MoecError):
    """The small model has no experts: its configuration leaves them out."""

    code = "no-experts"


@dataclass
class Tiny:
    """A small model.

    Attributes:
        model: In eval mode, float32.
        entry: Name of its class.
        encoder_decoder: It takes ``decoder_input_ids`` too.
        images: It takes pixels, not tokens.
        experts: Class names of its experts, for ``blocks``.
    """

    model: Any
    entry: str
    encoder_decoder: bool
    images: bool
    experts: frozenset[str] = field(default_factory=frozenset)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def blocks(self) -> list[str]:
        """Dotted paths of the MoE blocks: experts modules, those with one owner together."""
        return block_paths(self.model, self.experts)

    def inputs(self, seed: int) -> dict[str, torch.Tensor]:
        """Keyword arguments for one prefill of ``BATCH`` sequences."""
        generator = torch.Generator().manual_seed(seed)
        if self.images:
            size = self.model.config.image_size
            pixels = torch.randn(BATCH, self.model.config.num_channels, *size, generator=generator)
            return {"pixel_values": pixels, "dataset_index": torch.arange(BATCH)}
        names = ["input_ids", "decoder_input_ids"] if self.encoder_decoder else ["input_ids"]
        shape = (BATCH, LENGTH)
        made = {n: torch.randint(_FIRST_PLAIN_TOKEN, VOCAB - 1, shape, generator=generator) for n in names}
        if self.encoder_decoder:  # in eager mode an encoder may make one up; when it is compiled, it asks for it
            made["attention_mask"] = torch.ones(shape, dtype=torch.long)
        return made


def build(family: Family) -> Tiny:
    """The family's small model.

    Raises:
        NoExpertsError: It has no experts.
        Exception: Whatever the family's code raises.
    """
    known = override(family.name)
    module = importlib.import_module(family.module)
    entry = getattr(module, known.entry or family.entries[0])
    config = shrink(entry.config_class, known.config)
    if config.is_encoder_decoder and known.entry is None:  # an encoder alone has half of the blocks
        entry = getattr(module, next(e for e in family.entries if e.endswith("ForConditionalGeneration")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHT_SEED)
        model = entry._from_config(config, dtype=torch.float32)
        randomise(model)
    model.eval()
    tiny = Tiny(model, entry.__name__, bool(config.is_encoder_decoder), known.images, family.experts)
    if not tiny.blocks():
        raise NoExpertsError(f"the small {tiny.entry} has no experts", hint="moec/coverage/overrides.py can add some")
    return tiny


def block_paths(model: torch.nn.Module, experts: frozenset[str]) -> list[str]:
    """Paths of the modules of the given classes, outermost only; several with one owner count as one, the owner.

    A block may keep its two GEMMs in two modules.
    """
    inside: list[str] = []
    owners: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in experts and not any(name.startswith(f"{path}.") for path in inside):
            inside.append(name)
            owners.setdefault(name.rpartition(".")[0], []).append(name)
    return [names[0] if len(names) == 1 else owner for owner, names in owners.items()]


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Noise in every weight: some families start routers and biases at zero, and what is zero can't be seen missing."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=WEIGHT_STD)
        elif parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=NOISE_STD)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name.endswith("bias"):
            buffer.add_(torch.randn_like(buffer), alpha=NOISE_STD)
