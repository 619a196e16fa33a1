"""A layer's attention: its products of matrices, and the core between them, by sizes alone.

Queries in groups that share keys and values (GQA, arXiv:2305.13245), or latents that all heads share (MLA,
DeepSeek-V2, arXiv:2405.04434, section 2.1). A prompt is attended causally, so half of all pairs count. A token that is
generated attends to all that came before; latents are then read as they lie in the cache, and the products that make
keys and values of them are moved to the other side (the same, appendix C).
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.cost.products import Product
from moec.targets import Target

CORE_EFFICIENCY = 0.56
"""Part of the peak that the core of a prompt reaches: 553 of 989 TFLOPS on Hopper, 1324 of 2250 on Blackwell, for 4096
tokens, arXiv:2603.07685, table 9 (by notes of others)."""
CORE_BACKWARD_EFFICIENCY = 0.43
"""The same of its backward, whose five products are 2.5 times the forward's two: 422 TFLOPS on Hopper, same table."""
BACKWARD_PRODUCTS = 2.5
"""Products of a backward over those of a forward."""


@dataclass(frozen=True)
class Attention:
    """Sizes of one layer's attention.

    Attributes:
        hidden: Width of a token.
        heads, kv_heads: Of queries; of keys and values.
        key, value: Width of a head's query and key, and of its value.
        query_latent, latent: Widths of MLA's latents, 0 without.
        rotated: Part of ``key`` that is one for all heads and is no latent's, 0 without MLA.
    """

    hidden: int
    heads: int
    kv_heads: int
    key: int
    value: int
    query_latent: int = 0
    latent: int = 0
    rotated: int = 0

    @property
    def cached(self) -> int:
        """Elements that are kept of a token."""
        return self.latent + self.rotated if self.latent else self.kv_heads * (self.key + self.value)

    def products(self, tokens: float, generates: bool = False, item: float = 2) -> list[Product]:
        """The products around the core, of ``tokens`` tokens with ``item`` bytes an element.

        Args:
            tokens: Of the step.
            generates: Tokens are generated, one or a few of each sequence, so that latents stay as they lie.
            item: Bytes of an element of tokens and weights; results have two.
        """
        sizes = [(self.hidden, self.query_latent), (self.query_latent or self.hidden, self.heads * self.key)]
        sizes = [s for s in sizes if s[1]]
        if self.latent:
            sizes.append((self.hidden, self.latent + self.rotated))
        else:
            sizes.append((self.hidden, self.kv_heads * (self.key + self.value)))
        if self.latent and not generates:
            sizes.append((self.latent, self.heads * (self.key - self.rotated + self.value)))
        sizes.append((self.heads * self.value, self.hidden))
        found = [Product(tokens, inputs, outputs, 1, item, item) for inputs, outputs in sizes]
        if self.latent and generates:  # a product a head, in 16 bits
            found.append(Product(tokens, self.key - self.rotated, self.latent, self.heads))
            found.append(Product(tokens, self.latent, self.value, self.heads))
        return found

    def prompt_flops(self, tokens: float, length: float) -> float:
        """Operations of the core on ``tokens`` tokens of prompts of ``length`` tokens each."""
        return tokens * length * self.heads * (self.key + self.value)  # two for a multiply-add, half of all pairs

    def generated_flops(self, tokens: float, context: float) -> float:
        """Operations of the core where each of ``tokens`` tokens attends to ``context`` others."""
        width = 2 * self.latent + self.rotated if self.latent else self.key + self.value
        return 2 * tokens * context * self.heads * width

    def cache_bytes(self, sequences: float, context: float, item: float = 2) -> float:
        """What is read of the cache for a step of so many sequences."""
        return sequences * context * self.cached * item


def core_seconds(flops: float, bytes: float, target: Target, backward: bool = False) -> float:
    """Of the core: arithmetic in 16 bits, or what it reads.

    Args:
        flops: Of the forward.
        bytes: Read and written.
        target: Where.
        backward: The backward of so many.
    """
    peak = target.flops_per_s("bf16")
    efficiency = CORE_BACKWARD_EFFICIENCY if backward else CORE_EFFICIENCY
    return max(flops * (BACKWARD_PRODUCTS if backward else 1.0) / (peak * efficiency), bytes / target.memory_bandwidth)
