"""Which experts tokens choose in a simulation: all equally often, by Zipf's law, or as a histogram says.

Choices are drawn without replacement, as the largest of log p + a Gumbel number (Kool et al., arXiv:1903.06059, section
2.2), so that shares hold approximately for a token's first choice and less for its further ones. ``balanced`` draws
nothing: experts take turns, and all have equally many rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moec.ir.errors import nearest
from moec.routing.store import load_routing
from moec.simulate.errors import SimulationError

KINDS = ("balanced", "uniform", "zipf:1.2", "a .json file")


@dataclass(frozen=True)
class Routing:
    """How choices are made.

    Attributes:
        kind: ``balanced``, ``drawn``.
        skew: Exponent of Zipf's law: the n-th expert's share goes with n^-skew. 0 for equal shares.
        histograms: Shares of every expert, of every layer in turn; () for Zipf's law.
        seed: Of the numbers that are drawn, and of which experts are the often chosen ones.
    """

    kind: str = "balanced"
    skew: float = 0.0
    histograms: tuple[tuple[float, ...], ...] = ()
    seed: int = 0

    @staticmethod
    def parse(text: str, seed: int = 0) -> Routing:
        """A routing from its text: ``balanced``, ``uniform``, ``zipf:1.2``, or a file.

        The file is JSON: a list of counts, or a profile of ``moec profile --routing``.

        Raises:
            SimulationError: It is none of these.
            RoutingError: It is a routing profile that cannot be used.
        """
        if text == "balanced":
            return Routing(seed=seed)
        if text == "uniform":
            return Routing("drawn", seed=seed)
        if text.endswith(".json"):
            return Routing("drawn", histograms=_read(Path(text)), seed=seed)
        name, _, number = text.partition(":")
        try:
            skew = float(number or 1.0)
        except ValueError:
            skew = -1.0
        if name != "zipf" or not 0 <= skew < 100:
            raise SimulationError(f"unknown skew {text!r}; {nearest(text, KINDS)}", hint="skews: " + ", ".join(KINDS))
        return Routing("drawn", skew, seed=seed)

    def shares(self, experts: int, layer: int = 0) -> Tensor:
        """f64[E], how often each expert is a token's first choice; their sum is 1.

        Raises:
            SimulationError: The histogram is of another number of experts.
        """
        if self.histograms:
            counts = self.histograms[layer % len(self.histograms)]
            if len(counts) != experts:
                raise SimulationError(
                    f"the histogram is of {len(counts)} experts, a layer has {experts}",
                    hint="profile the model that is simulated",
                )
            found = torch.tensor(counts, dtype=torch.float64)
        else:
            gen = torch.Generator().manual_seed(self.seed * 7919 + layer)
            law = torch.arange(1, experts + 1, dtype=torch.float64) ** -self.skew
            found = law[torch.randperm(experts, generator=gen)] if self.skew else law
        return found / found.sum()

    def ids(
        self,
        rank: int,
        tokens: int,
        top_k: int,
        experts: int,
        *,
        layer: int = 0,
        groups: int = 0,
        top_groups: int = 0,
        per_group: int = 0,
    ) -> Tensor:
        """The choices of a rank's tokens in one layer, i64[T, k].

        Args:
            rank: Every rank has tokens of its own.
            tokens: T.
            top_k: k.
            experts: E.
            layer: Which layer; each has other often chosen experts.
            groups: The experts' groups, as ``moe.route`` has them.
            top_groups: A token's experts are all in so many groups.
            per_group: A token has so many experts in each group.

        Raises:
            SimulationError: There are fewer experts than choices.
        """
        if top_k > experts:
            raise SimulationError(f"a token cannot choose {top_k} of {experts} experts")
        if self.kind == "balanced" and not (top_groups or per_group):
            start = rank * tokens * top_k
            return ((start + torch.arange(tokens * top_k)) % experts).view(tokens, top_k)
        draw = np.random.default_rng((self.seed, layer, rank)).random((tokens, experts), dtype=np.float32)
        noise = -np.log(-np.log(np.clip(draw, 1e-30, 1 - 2**-24)))  # numpy draws the same on any number of threads
        score = torch.from_numpy(noise) + self.shares(experts, layer).clamp_min(1e-12).log().float()
        if per_group:
            each = experts // groups
            best = score.view(tokens, groups, each).topk(per_group, dim=2).indices
            return (best + torch.arange(0, groups * each, each)[:, None]).flatten(1)
        if top_groups:
            by_group = score.view(tokens, groups, experts // groups)
            kept = by_group.amax(2).topk(top_groups, dim=1).indices
            mask = torch.zeros(tokens, groups, dtype=torch.bool).scatter(1, kept, True)
            score = score.masked_fill(~mask[:, :, None].expand_as(by_group).reshape(tokens, experts), -torch.inf)
        return score.topk(top_k, dim=1).indices


def _read(path: Path) -> tuple[tuple[float, ...], ...]:
    """The histograms of a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SimulationError(f"the histogram {path} cannot be read: {e}") from e
    if isinstance(data, dict):
        found = tuple(tuple(map(float, layer.loads)) for layer in load_routing(path).layers)
    else:
        try:
            found = (tuple(float(count) for count in data),)
        except (TypeError, ValueError):
            found = ()
    if not found or any(not counts or min(counts) < 0 or not sum(counts) > 0 for counts in found):
        raise SimulationError(
            f"{path} holds no histogram", hint="a list of counts from 0 up, one for each expert, or a routing profile"
        )
    return found
