"""Measuring this machine for the cost model: what it allows at best, and what the kernels reach."""

from __future__ import annotations

from moec.calibration.measure import calibrate

__all__ = ["calibrate"]
