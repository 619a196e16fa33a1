"""Readying a model before capture: :func:`prepare` (also ``moec.prepare``).

The package isn't named after its function, because a submodule ``moec.prepare`` would hide the function of that name.
"""

from moec.readiness.prepare import prepare
from moec.readiness.report import ExpertsSite, LeftOut, PrepareReport, RegionGroup

__all__ = ["ExpertsSite", "LeftOut", "PrepareReport", "RegionGroup", "prepare"]
