"""The cost model: how long an MoE layer takes on a machine, from its sizes, its routing and a profile of the machine.

Pure arithmetic on numbers: nothing here imports torch or runs a kernel, so passes and backends may ask as they like.
The profile comes from :mod:`moec.calibration`, or from the vendors' numbers in :mod:`moec.targets`.
"""

from __future__ import annotations

from moec.cost.layer import LayerShape, LayerTime, predict, threads_for
from moec.cost.library import library_is_faster
from moec.cost.machine import GemmCurve, MachineProfile, defaults_for
from moec.cost.store import ProfileError, ProfileWarning, load_profile, machine_for, save_profile

__all__ = [
    "GemmCurve",
    "LayerShape",
    "LayerTime",
    "MachineProfile",
    "ProfileError",
    "ProfileWarning",
    "defaults_for",
    "library_is_faster",
    "load_profile",
    "machine_for",
    "predict",
    "save_profile",
    "threads_for",
]
