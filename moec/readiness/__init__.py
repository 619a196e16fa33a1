"""Readying a model before capture: :func:`prepare` (also ``moec.prepare``), :func:`drop_dead_experts`.

The package isn't named after its function, because a submodule ``moec.prepare`` would hide the function of that name.
"""

from moec.readiness.dead_experts import DeadExpertsReport, DroppedExperts, drop_dead_experts
from moec.readiness.prepare import prepare
from moec.readiness.report import ExpertsSite, LeftOut, PrepareReport, RegionGroup

__all__ = [
    "DeadExpertsReport",
    "DroppedExperts",
    "ExpertsSite",
    "LeftOut",
    "PrepareReport",
    "RegionGroup",
    "drop_dead_experts",
    "prepare",
]
