"""``moec.prepare``: set a model up so that its experts can be captured and its depth costs no compile time."""

from __future__ import annotations

import weakref
from typing import Literal

import torch

from moec.ir.errors import MoecError
from moec.readiness.experts import ImplementationChange, followers, lookalikes
from moec.readiness.loops import LoopChange
from moec.readiness.regions import RegionChange
from moec.readiness.report import PrepareReport
from moec.readiness.rewriters import RewriteChange

DEFAULT_IMPLEMENTATION = "grouped_mm"


class PrepareError(MoecError):
    """Arguments that ``moec.prepare`` cannot act on."""

    code = "prepare"


class _Changes:
    """What was done to one model, to be undone in reverse."""

    def __init__(
        self, implementation: ImplementationChange, rewriting: RewriteChange, regions: RegionChange | None
    ) -> None:
        self.implementation, self.rewriting, self.regions = implementation, rewriting, regions
        self.loops: LoopChange | None = None

    def undo(self) -> None:
        if self.regions is not None:
            self.regions.undo()
        if self.loops is not None:
            self.loops.undo()
        self.rewriting.undo()
        self.implementation.undo()


_prepared: weakref.WeakKeyDictionary[torch.nn.Module, _Changes] = weakref.WeakKeyDictionary()


def prepare(
    model: torch.nn.Module,
    *,
    implementation: str | None = DEFAULT_IMPLEMENTATION,
    regions: bool | Literal["auto"] = "auto",
    free_unused: bool = False,
) -> PrepareReport:
    """Ready a model for capture, in place; its outputs stay what they were.

    Three things are done. Every experts module that follows transformers' experts interface is set to one
    implementation (the default eager loop of some models cannot be traced). Modules that ignore the interface and are
    of a class that moec knows get a forward that computes the same and can be traced; others are named, and Dynamo gets
    leave to trace their Python loop over experts as one graph (:mod:`moec.readiness.loops`). And decoder layers that
    are alike are marked, so that torch.compile traces and compiles one of them and reuses it for the others: the whole
    layer in inference without a cache, its MoE block where a cache is passed, nothing where gradients are on. Outside
    torch.compile the marks do nothing.

    Preparing again starts afresh from the unprepared model, so that ``prepare(model).undo()`` always leaves the model
    as it was before the first call. A model without transformers' experts is left alone, and a note says so.

    Args:
        model: Any module.
        implementation: Name in transformers' experts interface; None leaves it as it is.
        regions: ``"auto"`` marks groups of at least four alike layers, True of at least two, False none.
        free_unused: Give back weights that the model allocates and never reads (those of LongCat-Flash's identity
            experts). They stay freed after ``undo()``, and a saved ``state_dict`` has the smaller shape; one of the
            full shape still loads. An optimizer that has state for these weights must be made anew.

    Returns:
        What was done and what was left, with ``undo()``.

    Raises:
        MoecError: The model is no module, ``regions`` is none of the three, or no interface in the model knows the
            implementation.
    """
    if not isinstance(model, torch.nn.Module):
        raise PrepareError(f"prepare takes a torch.nn.Module, not {type(model).__name__}")
    if regions not in ("auto", True, False):
        raise PrepareError(f"regions is {regions!r}", hint="use 'auto', True or False")
    if model in _prepared:
        _prepared.pop(model).undo()
    report = PrepareReport(type(model).__name__, implementation)
    experts = followers(model)
    setting = ImplementationChange(experts, implementation if experts else None)  # first: it may refuse its argument
    change = _Changes(setting, RewriteChange(model, free_unused=free_unused), None)
    report.experts, report.rewritten = setting.sites, change.rewriting.sites
    report.ignored, report.left_out = lookalikes(model), change.rewriting.left
    if not experts and not report.rewritten:
        report.notes.append(_nothing_to_do(report))
    change.loops = LoopChange(model, (left.name for left in report.ignored))  # first: a marked module is in no region
    report.loops = change.loops.names
    if regions and (experts or report.rewritten):
        own = {site.name: model.get_submodule(site.name) for site in report.rewritten if site.runs_experts}
        change.regions = RegionChange(model, {**experts, **own}, regions)
        report.regions = change.regions.groups
        report.left_out = [*report.left_out, *change.regions.left_out]
    _prepared[model] = change
    reference = weakref.ref(model)

    def undo() -> None:
        alive = reference()
        if alive is not None and _prepared.get(alive) is change:
            _prepared.pop(alive).undo()

    report._undo = undo
    return report


def _nothing_to_do(report: PrepareReport) -> str:
    if report.ignored:
        return "no module follows transformers' experts interface or is of a known class: loops are traced as written"
    return "the model has no experts: nothing was changed"
