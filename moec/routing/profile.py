"""The routing profile: what routers did on some tokens, as numbers that a pass, a simulator or a person can use."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.parallel_semantics import chunk_sizes
from moec.passes.reschedule_tokens import Least

SIGMAS_OF_CLUSTERS = 5.0
"""A layer has clusters where its tokens save more than shuffled ones by this many standard errors of the mean. So
high because all layers and sizes of a model are asked, and each could be the one that is far out by chance."""
LEAST_GAIN = 0.02
"""And by this part of what is touched: less is not worth two gathers."""
SIGMAS_OF_A_CALL = 3.0
"""What a call must save above the mean of shuffled tokens, in their standard deviations, so that it is not chance."""


@dataclass(frozen=True)
class Trial:
    """What regrouping micro-batches of ``tokens`` tokens in all saves, as parts of what they touch as they come.

    Attributes:
        tokens: In all micro-batches together.
        windows: How often it was tried, each on other tokens.
        saved: Mean over the windows.
        chance: The same where the experts were shuffled among the same tokens, which keeps every expert's load and
            nothing else.
        gain_spread: Standard deviation, over windows, of what is saved above chance.
        chance_spread: Standard deviation of what shuffled tokens save.
    """

    tokens: int
    windows: int
    saved: float
    chance: float
    gain_spread: float
    chance_spread: float

    @property
    def clustered(self) -> bool:
        """Tokens have more in common than chance gives them."""
        error = self.gain_spread / self.windows**0.5
        return self.saved - self.chance > max(SIGMAS_OF_CLUSTERS * error, LEAST_GAIN)


@dataclass(frozen=True)
class Clusters:
    """Trials of one way to regroup, by number of tokens, ascending.

    Attributes:
        batches: Micro-batches.
        ranks: Ranks that are counted, over which experts are dealt out evenly; 0 where experts are counted.
        trials: One for each number of tokens.
    """

    batches: int
    ranks: int
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class LayerRouting:
    """What the router of one layer did.

    Attributes:
        name: Of the block.
        experts: E.
        top_k: Experts a token.
        loads: Tokens of every expert.
        srp: ``(m, SRP(m), ρ)`` for some lengths m (:func:`moec.routing.consistency.best_performance`).
        sch: ``(m, SCH(m, 1 .. E))``; m = 0 stands for all tokens that follow
            (:func:`moec.routing.consistency.hit_rates`).
        clusters: What regrouping tokens saves.
    """

    name: str
    experts: int
    top_k: int
    loads: tuple[int, ...]
    srp: tuple[tuple[int, float, float], ...] = ()
    sch: tuple[tuple[int, tuple[float, ...]], ...] = ()
    clusters: tuple[Clusters, ...] = ()


@dataclass(frozen=True)
class RoutingProfile:
    """What the routers of a model did on some tokens.

    Attributes:
        model: Name of the model.
        tokens: How many were seen.
        sequences: In how many sequences.
        calls: In how many calls of the model.
        layers: In the order in which they ran.
        transitions: Between each layer and the next: ``(e, e', n)`` for n tokens that chose e and then e'. Pairs that
            no token chose are left out.
    """

    model: str
    tokens: int
    sequences: int
    calls: int
    layers: tuple[LayerRouting, ...]
    transitions: tuple[tuple[tuple[int, int, int], ...], ...] = ()

    def rows(self, module: str, ranks: int, experts: int) -> list[list[float]] | None:
        """Rows of a step that every rank sends to every expert, [N][E]; what the pass ``overlap`` asks.

        A step is a mean call of the model, and all ranks' tokens choose alike. None where no layer is called as
        ``module`` or lies around it.
        """
        found = next((x for x in self.layers if f"{module}.".startswith(f"{x.name}.") and x.experts == experts), None)
        return None if found is None else [[load / self.calls for load in found.loads]] * ranks

    def least_saving(self, experts: int, top_k: int, batches: int, sizes: tuple[int, ...]) -> Least | str:
        """What a call must save so that it is no chance, by its tokens; or why regrouping is not known to pay.

        Layers of one shape are compiled to one program, so all of that shape are asked together.

        Args:
            experts: E.
            top_k: Experts a token.
            batches: Micro-batches that share their tokens.
            sizes: Experts of every rank, where ranks are counted; () where experts are.
        """
        layers = [layer for layer in self.layers if (layer.experts, layer.top_k) == (experts, top_k)]
        if not layers:
            return f"the routing profile has no layer with {experts} experts and {top_k} a token"
        same = [
            c
            for layer in layers
            for c in layer.clusters
            if c.batches == batches and (chunk_sizes(experts, c.ranks) if c.ranks else ()) == sizes
        ]
        if not same:
            what = f"{len(sizes)} ranks" if sizes else "experts"
            return f"the routing profile has no trials of {batches} micro-batches and {what}"
        found = [c.trials for c in same if any(t.clustered for t in c.trials)]
        if not found:
            best = max((t for c in same for t in c.trials), key=lambda t: t.saved - t.chance)
            return f"the routing profile shows no clusters: {best.saved:.1%} saved, {best.chance:.1%} by chance alone"
        points: dict[int, float] = {}
        for trial in (t for trials in found for t in trials):
            least = round(trial.chance + SIGMAS_OF_A_CALL * trial.chance_spread, 4)
            points[trial.tokens] = max(points.get(trial.tokens, 0.0), least)
        return tuple(sorted(points.items()))
